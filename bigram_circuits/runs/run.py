"""A finished run as a value: read from its folder, copied, recognised."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigram_circuits.circuit import Circuit
from bigram_circuits.evaluation import Evaluation
from bigram_circuits.explanations.explanation import Atlas, load_atlas_and_origin
from bigram_circuits.masking.apply import Mask
from bigram_circuits.measures import html
from bigram_circuits.measures.results import Result, load_result_and_origin
from bigram_circuits.measures.words import rounded, sentence
from bigram_circuits.names import model_words, short_name
from bigram_circuits.recipe import Inputs
from bigram_circuits.runs.contents import (
    FORMER,
    CorpusIdentity,
    InputCheck,
    Outcome,
    RunSettings,
    StepRecord,
    read_config,
)
from bigram_circuits.runs.ending import cautions, why_stopped
from bigram_circuits.runs.folder import CORE, RunFolder, check_belongs, check_links
from bigram_circuits.storage.files import damaged, read_checked_json, whole_folder
from bigram_circuits.storage.locks import holder
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import check_no_link, opened
from bigram_circuits.storage.terminal import printable
from bigram_circuits.storage.typed import from_json
from bigram_circuits.subnetwork import Subnetwork

LEFT_OUT = "left_out.json"
"""File beside a run's analyses: the analyses that were left out, with reasons."""
ATLAS = "atlas.json"
"""File beside a run's analyses: explanations of what follows its tokens."""
RENAMED = {"exciting_tokens": "max_activating_tokens"}
"""Analyses that an earlier version wrote under another name: former name -> present name."""


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder.

    Example:
        >>> run = bc.load_run("runs/short")
        >>> print(run.subnetwork, run.why)
        >>> run.history[-1].cross_entropy  # of the last step
    """

    path: Path
    """The folder."""
    settings: RunSettings
    """Model, corpus, target and recipe."""
    rebuild: Inputs | None
    """Names of model, text and target; None for a run made in Python from objects."""
    versions: Mapping[str, str]
    """Versions of Python and of the packages that matter."""
    mask: Mask
    """The subnetwork or circuit found."""
    outcome: Outcome
    """How learning ended."""
    evaluation: Evaluation | None
    """Its faithfulness and that of its controls; None if it was not evaluated."""
    history: list[StepRecord]
    """One record for each training step; empty if it was not read."""
    created: str | None = None
    """When the run began, in UTC (ISO 8601); None if it was not recorded."""
    id: str | None = None
    """Checksum of `config.json`, which the run's other files repeat."""
    evaluated_on: CorpusIdentity | None = None
    """The text that it was evaluated on; None if it was not evaluated, or this was not recorded."""
    made_here: bool = False
    """Whether it was made by this user on this machine; the names in a run from elsewhere are not opened unasked."""
    checked: InputCheck | None = None
    """What was found of model, text and target before learning; None if they were not checked."""
    is_former: bool = False
    """Whether version 0.1.0 made it, whose files do not name the run that they are of."""

    @property
    def subnetwork(self) -> Subnetwork:
        """The subnetwork found.

        Raises:
            AttributeError: If the run found a circuit.
        """
        if not isinstance(self.mask, Subnetwork):
            raise AttributeError(f"the run in {str(self.path)!r} found a circuit, and no subnetwork: see `circuit`")
        return self.mask

    @property
    def circuit(self) -> Circuit:
        """The circuit found.

        Raises:
            AttributeError: If the run found a subnetwork.
        """
        if not isinstance(self.mask, Circuit):
            raise AttributeError(f"the run in {str(self.path)!r} found a subnetwork, and no circuit: see `subnetwork`")
        return self.mask

    def check_origin(self, path: str | os.PathLike[str], of: Origin | None, remedy: str) -> None:
        """Check that a file of the run's folder is of this run, and not of another one of the same model.

        Raises:
            ValueError: If it is of another run or does not say; with `remedy`, which says what to do.
        """
        check_belongs(Path(path), of, self.id, self.mask, self.is_former, remedy)

    @property
    def last_attempt(self) -> list[StepRecord]:
        """The records of the attempt that gave the subnetwork."""
        return [one for one in self.history if one.attempt == self.history[-1].attempt]

    @property
    def why(self) -> str:
        """Why learning stopped, as a phrase."""
        return why_stopped(self.outcome, self.settings.recipe)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What the records of learning warn of, a phrase each: `FoundSubnetwork.cautions`."""
        return cautions(self.last_attempt, self.outcome, self.settings.recipe)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The contents of `metrics.json`: `evaluation` as JSON values."""
        return None if self.evaluation is None else self.evaluation.to_json()

    @property
    def analyses(self) -> dict[str, Result]:
        """The results of `analyze` by name (`logit_lens`, ...); empty if it was not analysed.

        Raises:
            ValueError: If one of them is damaged, or of another run.
        """
        return {name: result for name, (result, _) in self._read_analyses().items()}

    @property
    def analysed_on(self) -> CorpusIdentity | None:
        """The text that it was analysed on; None if it was not analysed, or this was not recorded."""
        texts = {_text_of(of) for _, of in self._read_analyses().values()} - {None}
        return texts.pop() if len(texts) == 1 else None

    def _read_analyses(self) -> dict[str, tuple[Result, Origin | None]]:
        folder = self.path / "analysis"
        check_no_link(folder)
        found = {}
        for path in sorted(folder.glob("*.json")):
            if path.name not in (LEFT_OUT, ATLAS):
                result, of = load_result_and_origin(path, follow=False)
                self.check_origin(path, of, self._again)
                found[RENAMED.get(path.stem, path.stem)] = result, of
        return found

    @property
    def atlas(self) -> Atlas | None:
        """Explanations of what follows the most frequent tokens, or of a task's answers; None if there are none.

        Raises:
            ValueError: If its file is damaged, or of another run.
        """
        path = self.path / "analysis" / ATLAS
        if not path.is_file():
            return None
        check_no_link(path)
        atlas, of = load_atlas_and_origin(path, follow=False)
        self.check_origin(path, of, self._again)
        return atlas

    @property
    def _again(self) -> str:
        return f"`analyze {self.path}` writes it again"

    @property
    def left_out(self) -> dict[str, str]:
        """The analyses that `analyze` left out because the model does not support them, with reasons."""
        path = self.path / "analysis" / LEFT_OUT
        if not path.is_file():
            return {}
        record = read_checked_json(path, self._again)
        with damaged(path, self._again):
            of = from_json(Origin | None, record.pop("of", None), "of")
            left_out: Mapping[str, str] = from_json(Mapping[str, str], record)
        self.check_origin(path, of, self._again)
        return {str(RENAMED.get(name, name)): reason for name, reason in left_out.items()}

    @property
    def model_words(self) -> str:
        """The name of its model, as a phrase."""
        name = (self.rebuild and self.rebuild.model) or self.settings.model.name or self.mask.model_name
        return model_words(name)

    @property
    def target_words(self) -> tuple[str, str]:
        """The name of its target and a phrase that describes it."""
        if self.rebuild is not None:
            return self.rebuild.target_words
        kind = self.settings.target.kind or "target"
        return kind, f"the target {kind}"

    @property
    def plain_target(self) -> tuple[str, str]:
        """Its target without jargon: phrases that complete "enough to ..." and "predictions that agree with ..."."""
        if self.rebuild is not None:
            return self.rebuild.plain_target
        meaning = self.target_words[1]
        return f"reproduce {meaning}", meaning

    def __repr__(self) -> str:
        return f"Run({printable(str(self.path))!r}: {self.mask!r})"

    def _repr_html_(self) -> str:
        """HTML for notebooks: the inputs, how learning ended, and the result."""
        asked = f"Model: {short_name(self.settings.model.name or 'unknown')}. Text: {self.settings.corpus.source}."
        ended = f"Stopped after {len(self.history):,} steps: {self.why}."
        shown = self.mask._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return html.summary(f"Run in {self.path}", [asked, ended, *map(sentence, self.cautions), self._answer()], shown)

    def _answer(self) -> str:
        """How faithful the subnetwork is, as a sentence."""
        if self.evaluation is None:
            return "It was not evaluated."
        r = rounded(self.evaluation.subnetwork.surprisal_correlation)
        return f"Correlation with the target's surprisals: {r}. {self.evaluation.verdict}"


def load_run(folder: str | os.PathLike[str], *, history: bool = True) -> Run:
    """Read a finished run.

    Nothing is written, so the folder may be read-only.

    Args:
        folder: Its folder.
        history: Read the training records too; a comparison of many runs does without them.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no run.
        ValueError: If the run is not finished, a file is damaged, of another run or a symbolic link, or it has another
            format.

    Example:
        >>> run = bc.load_run("runs/short")
        >>> bc.evaluate(model, run, target, text, controls=False)  # a run can be given wherever a subnetwork can
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{str(path)!r} holds no run: it has no config.json")
    check_links(path)
    config = read_config(path)
    files = RunFolder(path)
    if not files.is_finished:
        who = holder(path)
        raise ValueError(
            f"the run in {str(path)!r} is not finished: "
            + (f"wait for {who}, or, if that has ended, " if who else "")
            + "run the same command again to continue it"
        )
    mask, outcome = files.found()
    files.check_progress()
    measured = files.read_evaluation()
    run = Run(
        path=path,
        settings=config.settings,
        rebuild=config.rebuild,
        versions=config.versions,
        mask=mask,
        outcome=outcome,
        evaluation=measured and measured[0],
        history=files.history() if history else [],
        created=config.created,
        id=files.id,
        evaluated_on=measured and _text_of(measured[1]),
        made_here=config.is_ours,
        checked=config.checked,
        is_former=config.format == FORMER,
    )
    if measured:
        remedy = f"`evaluate {path}` writes it again once it is removed"
        run.check_origin(path / "metrics.json", measured[1], remedy)
        own = measured[0].subnetwork
        if (own.kept, own.total) != (run.mask.kept, run.mask.total):
            raise ValueError(
                f"{str(path / 'metrics.json')!r} does not belong to this run: it is of a {run.mask.noun} that keeps "
                f"{own.kept:,} of {own.total:,} {run.mask.units_here}; {remedy}"
            )
    return run


def _text_of(of: Origin | None) -> CorpusIdentity | None:
    return None if of is None or of.text is None else CorpusIdentity(of.source, of.text)


def run_id(folder: str | os.PathLike[str]) -> str | None:
    """The checksum of the `config.json` of the run in a folder; None if it holds no run that can be read."""
    try:
        read_config(Path(folder))
    except (OSError, ValueError):
        return None
    return RunFolder(Path(folder)).id


def copy_run(run: Run, folder: str | os.PathLike[str], *, with_evaluation: bool = False) -> RunFolder:
    """Copy a finished run to a new folder, without its analyses and, if not asked for, without its evaluation.

    Raises:
        ValueError: If the folder is not empty.
        OSError: If it cannot be written.
    """
    names = (*CORE, "metrics.json") if with_evaluation else CORE
    with whole_folder(folder, replace=False) as fresh:
        for name in names:
            if (run.path / name).is_file():
                with opened(run.path / name, follow=False) as source, (fresh / name).open("xb") as copy:
                    shutil.copyfileobj(source, copy)
    return RunFolder(Path(folder))
