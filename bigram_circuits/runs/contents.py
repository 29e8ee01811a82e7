"""What the files of a run hold, typed: settings, training records, outcome, checkpoints.

A model is told by its hash and a text by its fingerprint; their names only say where to find them again.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigram_circuits.evaluation import SoftHardGap
from bigram_circuits.models.identity import how_models_differ, same_text
from bigram_circuits.recipe import Inputs, SparsifyConfig
from bigram_circuits.storage.files import damaged, read_checked_json
from bigram_circuits.storage.origin import is_ours, signed
from bigram_circuits.storage.records import opened, parse_record, shown
from bigram_circuits.storage.typed import Record
from bigram_circuits.tasks.task import Ability
from bigram_circuits.text.coverage import ContextCoverage

FORMAT = "bigram_circuits.run/2"
FORMER = "bigram_circuits.run/1"  # of version 0.1.0, whose files do not name the run that they are of
STOPS = {
    "decided": "nearly all gates were decided",
    "planned": "its planned steps were done",
    "max_steps": "the maximum number of steps was reached",
    "unstable": "every attempt was unstable: do not trust the result",
}
"""Why learning stopped, as a phrase."""
_PACKAGES = ("bigram_circuits", "torch", "transformer_lens", "transformers", "tokenizers", "numpy")
_LARGEST_CONFIG = 1 << 24  # bytes of a `config.json` of somebody else


@dataclass(frozen=True)
class ModelIdentity(Record):
    """Identifies the model of a run."""

    name: str | None = None
    """The name it was loaded by."""
    revision: str | None = None
    """Revision of a hub model."""
    weight_hash: str | None = None
    """Its `weight_hash`."""
    dtype: str | None = None
    """Precision of its weights."""


@dataclass(frozen=True)
class CorpusIdentity(Record):
    """Identifies the text of a run."""

    source: str | None = None
    """Where it was read from, as a phrase."""
    fingerprint: str | None = None
    """Hash of its tokens."""
    tokenizer_hash: str | None = None
    """Hash of the tokenizer's vocabulary."""
    context_length: int | None = None
    """Tokens per sequence."""
    starts: str | None = field(default=None, compare=False)
    """What its sequences and documents begin with, as a phrase; the fingerprint covers it."""
    sample: str | None = field(default=None, compare=False)
    """Which part of the text was read, as a phrase; None: all of it. The fingerprint covers it."""


@dataclass(frozen=True)
class TargetIdentity(Record):
    """Identifies the target of a run."""

    kind: str | None = None
    """Name of its class."""
    fingerprint: str | None = None
    """The target's own fingerprint, if it has one."""


_OF_OTHERS = ("apart_from", "overlap_weight")


@dataclass(frozen=True)
class RunSettings(Record):
    """The settings that determine a run's result; a run folder belongs to one such set."""

    model: ModelIdentity
    """The model."""
    corpus: CorpusIdentity
    """The text."""
    target: TargetIdentity
    """The target."""
    recipe: SparsifyConfig
    """How masks are learned."""
    within: str | None = None
    """Checksum of the subnetwork that the search was restricted to, if any."""
    apart_from: tuple[str, ...] = ()
    """Checksums of the masks that it was learned apart from."""
    overlap_weight: float | int | None = None
    """What it cost to keep what these keep, in nats; None: that was excluded, or there are none."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; without those of other masks if there are none, as in earlier versions."""
        return {name: one for name, one in super().to_json().items() if self.apart_from or name not in _OF_OTHERS}


@dataclass(frozen=True)
class StepRecord(Record):
    """A step of learning, as recorded in `progress.jsonl`.

    Example:
        >>> last = found.history[-1]
        >>> print(last.step, last.cross_entropy, last.fraction)
    """

    attempt: int
    """Number of the attempt (data order), from 0."""
    step: int
    """Number of the step, from 0."""
    cross_entropy: float
    """Cross-entropy from the target to the softly masked model, nats."""
    fraction: float
    """Share of the maskable weights that would be kept if learning ended now."""
    undecided: float
    """Share of the gates between 0.1 and 0.9."""
    due: float | None = None
    """Share of the gated weights that should be open by now; None if there is no share to reach."""
    above_zero: float | None = None
    """Share of the gated weights with a positive score."""
    penalty: float | None = None
    """Mean penalised gate."""
    sparsity_weight: float | int | None = None
    """The penalty's weight."""


@dataclass(frozen=True)
class Rollback(Record):
    """An explosion of the loss, and the state the run went back to."""

    attempt: int
    """Number of the attempt."""
    step: int
    """The step at which the loss exploded."""
    what: str
    """What happened, as a phrase."""
    back_to: int
    """The step that the run went back to."""
    learning_rate: float
    """The learning rate from that step on."""


@dataclass(frozen=True)
class PolishRecord(Record):
    """What `polish` changed."""

    dropped: int
    """Number of weights that were dropped."""
    readmitted: int
    """Number of weights that were re-admitted."""
    before: float
    """Cross-entropy before, on the training text that was used, nats per position."""
    after: float
    """Cross-entropy afterwards, on the same text."""
    passes: int
    """Number of passes over the weights."""
    measured: int
    """Number of masks whose loss was measured."""


@dataclass(frozen=True)
class Outcome(Record):
    """How learning ended."""

    stopped_because: str
    """`decided` (few gates were undecided), `planned` (the last step was done, with gates that are the mask itself),
    `max_steps` (it was done with soft gates), and, after the last retry, `unstable`."""
    seconds: float = math.nan
    """Time spent learning, in seconds."""
    attempts: int = 1
    """Number of data orders tried."""
    soft_hard: SoftHardGap | None = None
    """Cross-entropy with the last soft gates and with the mask made of them; None if it was not recorded."""
    rollbacks: tuple[Rollback, ...] = ()
    """Every time the loss was not finite or exploded. The abandoned steps are not in the history."""
    polish: PolishRecord | None = None
    """What `polish` changed afterwards; None if the mask was not polished."""

    def __post_init__(self) -> None:
        if self.stopped_because not in STOPS:
            raise ValueError(f"stopped_because should be one of {', '.join(STOPS)}, not {shown(self.stopped_because)}")


@dataclass(frozen=True)
class InputCheck(Record):
    """What `check_inputs` found of model, text and target before learning.

    Example:
        >>> checked = bc.check_inputs(model, target, corpus)
        >>> print(checked.losses, checked.warnings)
    """

    inexpressible: float | None = None
    """Share of the training tokens that stand for text which the tokenizer has no tokens for: its unknown token, and
    bytes that are no character on their own. None if the tokens are not of the model's tokenizer."""
    contexts: ContextCoverage | None = None
    """How often the contexts of the target's n-grams occur; None for other targets and unigrams."""
    used: float | None = None
    """Share of held-out positions where the n-gram target gives the next token a probability above 0."""
    losses: tuple[float, float] | None = None
    """Next-token loss (nats) of the model and of the training text's unigram distribution, on a few held-out
    sequences."""
    ability: Ability | None = None
    """Whether the full model can do the task; None for other targets."""
    warnings: tuple[str, ...] = ()
    """What may be wrong, and what to do about it: a sentence each."""

    def __str__(self) -> str:
        return "\n".join(self.warnings) or "nothing to warn of"


@dataclass(frozen=True)
class Config(Record):
    """The contents of `config.json`."""

    format: str
    settings: RunSettings
    rebuild: Inputs | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str | None = None
    checked: InputCheck | None = None
    signature: str | None = None

    def signed(self) -> Config:
        """The same with the signature of this user on this machine."""
        return signed(self)

    @property
    def is_ours(self) -> bool:
        """Whether this user made it on this machine."""
        return is_ours(self)


@dataclass(frozen=True)
class ProgressState(Record):
    """Length in bytes and digest of `progress.jsonl`."""

    size: int
    digest: str


@dataclass(frozen=True)
class CheckpointState(Record):
    """The contents of a checkpoint's header."""

    step: int
    attempt: int
    seconds: float
    rollbacks: tuple[Rollback, ...] = ()
    good_step: int | None = None
    progress: ProgressState | None = None
    """Only in checkpoints of version 0.1.0: later ones hold the lines themselves."""
    run: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run during learning."""

    tensors: Mapping[str, Tensor]
    """The gates' scores and the optimizer's moments."""
    step: int
    """Steps done."""
    attempt: int
    """Number of the attempt (data order), from 0."""
    seconds: float
    """Time spent learning so far, in seconds."""
    rollbacks: tuple[Rollback, ...] = ()
    """The rollbacks of this attempt."""
    good_step: int | None = None
    """The step of the last good state, whose tensor names start with `good.`; None: only the attempt's start."""

    def state(self, run: str | None) -> CheckpointState:
        """The header: everything except the tensors, with the run that it is of."""
        return CheckpointState(self.step, self.attempt, self.seconds, self.rollbacks, self.good_step, run=run)


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that can affect a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found | {"threads": str(torch.get_num_threads())}


def read_config(path: Path) -> Config:
    """Read the `config.json` of a run's folder.

    Raises:
        ValueError: If it is damaged, or not a run's.
    """
    config = path / "config.json"
    remedy = "choose another folder, or remove this one and run again"
    try:
        record = read_checked_json(config, remedy)
    except ValueError:
        if not _is_foreign(config):
            raise
        record = {}
    if record.get("format") not in (FORMAT, FORMER):
        raise ValueError(
            f"{str(config)!r} does not belong to a run (its format is {shown(record.get('format'))}, not {FORMAT!r}): "
            "choose another folder"
        )
    with damaged(config, remedy):
        return Config.from_json(record)


def _is_foreign(config: Path) -> bool:
    """Whether a `config.json` is a valid record without a checksum and of no format of ours: for example a model's."""
    try:
        with opened(config, follow=False) as file:
            record = parse_record(file.read(_LARGEST_CONFIG))
    except ValueError:
        return False
    return isinstance(record, dict) and "checksum" not in record and record.get("format") not in (FORMAT, FORMER)


def how_runs_differ(there: RunSettings, wanted: RunSettings) -> str | None:
    """The first setting that differs, as a phrase; None if none does.

    A model is told by its hash and a text by its fingerprint, not by the names that found them. Hashes are compared by
    `how_models_differ`.
    """
    ours, theirs = wanted.model, there.model
    if ours.weight_hash and theirs.weight_hash:
        how = how_models_differ(theirs.weight_hash, ours.weight_hash)
        if how is not None:
            return f"its model is another, {how}"
        there = replace(there, model=replace(ours, dtype=theirs.dtype))
    if there.corpus.fingerprint:
        there = replace(there, corpus=replace(there.corpus, source=wanted.corpus.source))
    if same_text(there.target.fingerprint, wanted.target.fingerprint):
        there = replace(there, target=replace(there.target, fingerprint=wanted.target.fingerprint))
    return None if there == wanted else _difference(there.to_json(), wanted.to_json())


def _difference(there: Any, wanted: Any, at: str = "") -> str:
    """The first setting that differs, as a phrase."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in (*there, *wanted):
            if there.get(key) != wanted.get(key):
                return _difference(there.get(key), wanted.get(key), f"{at}.{key}" if at else key)
    return f"its {at or 'settings'} is {there!r}, not {wanted!r}"
