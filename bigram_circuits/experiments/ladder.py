"""The n-gram ladder: masks for unigram, bigram, trigram and induction, what each adds, and how they are related.

Each mask is found *free*, among all weights. The smaller n-grams are found again *nested*: the bigram within the
trigram's mask, and the unigram within that bigram's. If a smaller n-gram is part of the larger one's computation,
little is lost by looking for it there, and free masks share far more weights than by chance.

All masks are measured on the same held-out text: the model's loss at the next token with the mask, so that the
difference between two rungs is the information that the step adds, with a paired interval; and on repeated random
tokens, which tell n-grams from induction, since only the repetition says what comes next there (Olsson et al. 2022,
arXiv 2209.11895).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.analysis.overlap import overlap
from bigram_circuits.evaluation import Measured, measure
from bigram_circuits.learning.callbacks import Callback
from bigram_circuits.learning.found import FoundSubnetwork
from bigram_circuits.learning.ranks import refuse_several
from bigram_circuits.learning.training import find_subnetwork, identity_of
from bigram_circuits.measures import html
from bigram_circuits.measures.quantities import FRACTION, KL, MEAN_SURPRISAL, SURPRISAL_CORRELATION, Quantity
from bigram_circuits.measures.results import Effects
from bigram_circuits.measures.statistics import STATISTICS, Faithfulness, holm
from bigram_circuits.measures.words import percent, rounded, sentence, span
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.names import PartName, short_name
from bigram_circuits.recipe import TARGETS, SparsifyConfig
from bigram_circuits.runs import CorpusIdentity
from bigram_circuits.storage.files import checked_json, damaged, read_checked_json, remove_leftovers, write_text
from bigram_circuits.storage.locks import lock_folder
from bigram_circuits.storage.records import check_no_link
from bigram_circuits.storage.typed import Record
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.tasks.builtin import repeated_random_tokens
from bigram_circuits.tasks.target import TaskTarget
from bigram_circuits.tasks.task import Ability, Task, ability
from bigram_circuits.text.corpus import Corpus

N_GRAMS = ("unigram", "bigram", "trigram")
"""The n-grams, from the smallest."""
INDUCTION = "induction"
EMPTY, FULL = "empty", "full"
WITHIN: Mapping[str, str] = {"bigram within trigram": "trigram", "unigram within bigram": "bigram within trigram"}
"""The nested masks, in the order in which they are found, and the mask that each is part of."""
FREE_STEPS = (EMPTY, *N_GRAMS, FULL)
NESTED_STEPS = (EMPTY, "unigram within bigram", "bigram within trigram", "trigram", FULL)
_FILE = "ladder.json"
_LONGEST_BLOCK = 24  # random tokens that are repeated
_QUANTITIES = (
    MEAN_SURPRISAL,
    Quantity("repeated_surprisal", "nats", "Loss at random tokens that are repeated, where their block began again."),
    KL, SURPRISAL_CORRELATION,
    Quantity("faithfulness", "share", "1 - KL / KL of the empty subnetwork, for the mask's own target."), FRACTION,
)  # fmt: skip

Interval = tuple[float, float]
_NONE = (math.nan, math.nan)


@dataclass(frozen=True)
class Rung(Record):
    """A mask of the ladder, or one of its ends: the empty and the full model."""

    name: str
    """`unigram`, ..., `induction`; `bigram within trigram`; `empty`, `full`."""
    kept: int
    """Number of weights kept."""
    total: int
    """Number of maskable weights."""
    loss: float
    """Loss at the next token of the held-out text, nats a token."""
    loss_interval: Interval
    """Its 95% interval, from a bootstrap over sequences, like all intervals here."""
    repeated: float
    """Loss at repeated random tokens, nats a token."""
    repeated_interval: Interval
    """Its 95% interval."""
    own: Faithfulness | None = None
    """How well it reproduces its own target; None for the ends. For induction, of which r is undefined, KL is minus the
    log-probability of all right tokens of a prompt together."""
    kl_interval: Interval = _NONE
    """95% interval of its KL."""
    r_interval: Interval = _NONE
    """95% interval of its r."""
    kl_of_empty: float = math.nan
    """KL of the empty model from the same target."""
    kl_of_full: float = math.nan
    """KL of the full model."""
    places: Mapping[str, int] | None = None
    """Number of kept weights by part, `L0.attn`, `L0.mlp`, ...; None for the ends."""
    subnetwork: str | None = None
    """Checksum of its masks; None for the ends."""
    cautions: tuple[str, ...] = ()
    """What the records of learning warn of, a phrase each: a run too short, or what hardening changed."""

    @property
    def fraction(self) -> float:
        """Share of the weights that is kept."""
        return self.kept / self.total

    @property
    def within(self) -> str | None:
        """The mask that it was searched for in; None if that was the whole model."""
        return WITHIN.get(self.name)

    @property
    def faithfulness(self) -> float:
        """1 - KL / KL of the empty model: 1 if its target is reproduced; nan for the ends."""
        return math.nan if self.own is None else 1 - self.own.kl / self.kl_of_empty


@dataclass(frozen=True)
class Step(Record):
    """What one rung adds to the one before, on the same held-out text."""

    ladder: str
    """`free` or `nested`."""
    before: str
    """Name of the rung before."""
    name: str
    """Name of the rung."""
    gain: float
    """Loss of the rung before minus its own, nats a token."""
    interval: Interval
    """95% paired interval."""
    share: float
    """The gain over that of the full model over the empty one; nan if that is none."""


@dataclass(frozen=True)
class SharedWeights(Record):
    """The overlap of two masks of the ladder, against chance: as many weights drawn in every matrix."""

    first: str
    """Name of the first."""
    second: str
    """Name of the second."""
    shared: int
    """Weights kept by both."""
    expected: float
    """Number expected by chance."""
    share_of_first: float
    """Share of the first's weights that the second keeps."""
    share_of_second: float
    """Share of the second's weights that the first keeps."""
    log10_p: float
    """log10 of the exact one-sided p-value, with Holm's correction over pairs; nan if one was searched in the other, so
    that their overlap is given."""

    @property
    def ratio(self) -> float:
        """Shared weights over those expected by chance."""
        return self.shared / self.expected if self.expected else math.nan

    @property
    def is_given(self) -> bool:
        """Whether one was searched for in the other."""
        return math.isnan(self.log10_p)


@dataclass(frozen=True)
class Ladder(Record):
    """Masks for unigram, bigram, trigram and induction, free and nested, and what was measured of them.

    Example:
        >>> ladder = bc.load_ladder("runs/ladder")
        >>> ladder.plot("kl")
        >>> ladder.rung("bigram").kept
    """

    model: str
    """Name of the model."""
    weight_hash: str
    """Hash of its weights."""
    text: CorpusIdentity
    """The text that was counted, learned from and measured on."""
    recipe: SparsifyConfig
    """How masks were learned."""
    ability: Ability
    """Whether the full model does induction at all, on the repeated tokens that are measured."""
    rungs: tuple[Rung, ...]
    """The empty model, the masks found free, the nested ones, and the full model."""
    steps: tuple[Step, ...]
    """What each n-gram adds to the one before."""
    overlaps: tuple[SharedWeights, ...]
    """Every pair of masks that keep any weight."""

    def rung(self, name: str) -> Rung:
        """Look up a rung by name; raises ValueError if there is none."""
        found = next((one for one in self.rungs if one.name == name), None)
        if found is None:
            raise ValueError(f"there is no rung {name!r}: there are {', '.join(one.name for one in self.rungs)}")
        return found

    @property
    def effects(self) -> Effects:
        """The numbers of every rung with their intervals: both losses, KL, r, faithfulness and size."""
        rows = [
            [
                (one.loss, *one.loss_interval), (one.repeated, *one.repeated_interval),
                (one.own.kl if one.own else math.nan, *one.kl_interval),
                (one.own.surprisal_correlation if one.own else math.nan, *one.r_interval),
                (one.faithfulness, *_NONE), (one.fraction, *_NONE),
            ]
            for one in self.rungs
        ]  # fmt: skip
        values, low, high = np.array(rows, dtype=float).transpose(2, 1, 0)
        return Effects(
            "The n-gram ladder", _QUANTITIES, "rung", tuple(one.name for one in self.rungs), values, low, high
        )

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each rung: sizes, and every number with its interval."""
        table = self.effects.to_dataframe()
        table.insert(1, "kept", [one.kept for one in self.rungs])
        table.insert(2, "total", [one.total for one in self.rungs])
        return table

    def plot(self, quantity: str = "mean_surprisal") -> Any:
        """A plotly figure with a bar for each rung; the quantities are those of `effects`."""
        return self.effects.plot(quantity)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `ladder.json`, which `load_ladder` reads, to a folder."""
        write_text(Path(folder) / _FILE, checked_json(self.to_json()))

    @property
    def says(self) -> tuple[str, ...]:
        """What was found, a sentence each."""
        walks = (self._walk(ladder) for ladder in ("free", "nested"))
        return (*walks, self._repeats(), *self.cautions)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What the records of learning warn of, a sentence for each mask and caution."""
        return tuple(sentence(f"{one.name}: {caution}") for one in self.rungs for caution in one.cautions)

    def _walk(self, ladder: str) -> str:
        steps = [one for one in self.steps if one.ladder == ladder]
        parts = [f"{one.name} {one.gain:+.3f} ({span(*one.interval)})" for one in steps]
        return f"{ladder.capitalize()}, nats a token that each adds to the one before: {'; '.join(parts)}."

    def _repeats(self) -> str:
        losses = {name: self.rung(name).repeated for name in (FULL, INDUCTION, "trigram", EMPTY)}
        words = ", ".join(f"{name} {rounded(value)}" for name, value in losses.items())
        able = "" if self.ability.able else " The full model is not shown to do it better than guessing."
        return f"Loss at repeated tokens, nats (guessing {rounded(self.ability.chance)}): {words}.{able}"

    def __str__(self) -> str:
        lines = [f"{'':<24}{'kept':>12}{'share':>9}{'KL':>9}{'r':>8}{'loss':>9}{'95% interval':>20}{'repeated':>10}"]
        for one in self.rungs:
            kl, r = ("-", "-") if one.own is None else map(_cell, (one.own.kl, one.own.surprisal_correlation))
            lines.append(
                f"{one.name:<24}{one.kept:>12,}{percent(one.fraction):>9}{kl:>9}{r:>8}{rounded(one.loss):>9}"
                f"{span(*one.loss_interval):>20}{rounded(one.repeated):>10}"
            )
        lines += ["KL and r: to its own target; loss: of the next token; repeated: at repeated random tokens (nats)"]
        return "\n".join([*lines, *self.says]).replace("\N{NO-BREAK SPACE}", " ")

    def _repr_html_(self) -> str:
        """HTML for notebooks: a table of the rungs, and what each step adds."""
        columns, rows = self.table
        title = f"The n-gram ladder of {short_name(self.model)}"
        return html.summary(title, self.says, html.table(columns, rows, title))

    @property
    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table of rungs."""
        columns = ["rung", "kept", "share", "KL", "r", "loss", "95% interval", "repeated"]
        rows = []
        for one in self.rungs:
            kl, r = (math.nan, math.nan) if one.own is None else (one.own.kl, one.own.surprisal_correlation)
            loss = span(*one.loss_interval)
            rows.append([one.name, one.kept, percent(one.fraction), kl, r, one.loss, loss, one.repeated])
        return columns, rows


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else rounded(value)


@uses_model
def find_ladder(
    model: Model,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    prompts: int = 256,
    period: int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    check_memory: str = "warn",
) -> Ladder:
    """Find masks for unigram, bigram, trigram and induction, free and nested, and measure what each adds.

    It learns six masks. Tables are counted on the training part of the text. The induction mask is learned on repeated
    random tokens, and measured on others.

    Args:
        model: From `load_model`.
        corpus: Masks are learned on its training part and measured on its held-out part.
        config: The recipe; `SparsifyConfig()` by default.
        prompts: Number of prompts of repeated random tokens, of which equal ones count once; 30% are held out.
        period: Random tokens in a block, which is repeated once; by default 24, or as many as the model's context and
            vocabulary have room for.
        run_dir: A folder for the ladder: a run's folder for each mask, and `ladder.json`. The same call goes on where
            it was interrupted.
        callbacks: As for `find_subnetwork`.
        check_memory: As for `find_subnetwork`.

    Raises:
        ValueError: If `config` sets `target_fraction` (a nested mask of the same size would be the mask that it is
            within), the held-out part is empty, or the prompts do not fit the model.
        OSError: If another process is writing to `run_dir`, or it cannot be written.

    Example:
        >>> ladder = bc.find_ladder(model, corpus, run_dir="runs/ladder")
        >>> print(ladder.table)
    """
    refuse_several("find_ladder")
    config = config or SparsifyConfig()
    if config.target_fraction is not None:
        raise ValueError("a nested mask would be as large as the one it is within: leave out target_fraction")
    if not len(corpus.held_out):
        raise ValueError(f"the held-out part of the corpus {corpus.source!r} is empty, but rungs are measured on it")
    if period is None:
        period = max(2, min(_LONGEST_BLOCK, (model.cfg.n_ctx - 1) // 2, model.cfg.d_vocab // 2))
    task = repeated_random_tokens(model, prompts=prompts, period=period, seed=config.seed).distinct()
    folder = None if run_dir is None else Path(run_dir)
    how: dict[str, Any] = {"callbacks": callbacks, "check_memory": check_memory}
    with nullcontext() if folder is None else lock_folder(folder):
        if folder is not None:
            remove_leftovers(folder)
        ladder = _climb(model, corpus, task, config, folder, how)
        if folder is not None:
            ladder.save(folder)
    return ladder


def _climb(
    model: Model, corpus: Corpus, task: Task, config: SparsifyConfig, folder: Path | None, how: Mapping[str, Any]
) -> Ladder:
    tables = {name: TARGETS["ngram"].make(model, corpus, order) for order, name in enumerate(N_GRAMS, start=1)}
    repeated, repeats = TaskTarget(task), task.corpus()

    def found(name: str, target: Any, text: Corpus, within: FoundSubnetwork | None = None) -> FoundSubnetwork:
        place = None if folder is None else folder / name.replace(" ", "-")
        if place is not None:
            check_no_link(place)
        return find_subnetwork(model, target, text, config, run_dir=place, within=within, **how)

    learned = {name: found(name, table, corpus) for name, table in tables.items()}
    learned[INDUCTION] = found(INDUCTION, repeated, repeats)
    for name, outer in WITHIN.items():
        learned[name] = found(name, tables[_behaviour(name)], corpus, learned[outer])

    masks = {name: one.subnetwork for name, one in learned.items()}
    ends = {EMPTY: Subnetwork.empty(model), FULL: Subnetwork.full(model)}
    on_text = {
        (name, of): measure(model, mask, table, corpus.held_out)
        for name, mask in (masks | ends).items()
        for of, table in tables.items()
        if name in ends or of == (_behaviour(name) if name != INDUCTION else N_GRAMS[0])
    }
    on_repeats = {name: measure(model, mask, repeated, repeats.held_out) for name, mask in (masks | ends).items()}
    losses = {name: one for (name, _), one in on_text.items()}
    rungs = {name: _rung(name, mask, losses[name], on_repeats, on_text) for name, mask in (masks | ends).items()}
    rungs |= {name: replace(rungs[name], cautions=one.cautions) for name, one in learned.items()}
    return Ladder(
        model=str(model.cfg.model_name), weight_hash=weight_hash(model), text=identity_of(corpus), recipe=config,
        ability=ability(model, repeated.task_of(repeats.held_out)),
        rungs=tuple(rungs[name] for name in (EMPTY, *masks, FULL)), steps=_steps(losses),
        overlaps=_overlaps(masks),
    )  # fmt: skip


def _behaviour(name: str) -> str:
    """The n-gram, or induction, that a mask is of."""
    return name.split()[0]


def _rung(
    name: str, mask: Subnetwork, on_text: Measured, on_repeats: Mapping[str, Measured],
    by_target: Mapping[tuple[str, str], Measured],
) -> Rung:  # fmt: skip
    loss, repeated = STATISTICS["mean_surprisal"], on_repeats[name]
    both: dict[str, Any] = {
        "name": name, "kept": mask.kept, "total": mask.total, "loss": on_text.faithfulness.mean_surprisal,
        "loss_interval": on_text.interval(loss), "repeated": repeated.faithfulness.mean_surprisal,
        "repeated_interval": repeated.interval(loss),
    }  # fmt: skip
    if name in (EMPTY, FULL):
        return Rung(**both)
    of = _behaviour(name)
    measured = (
        on_repeats if of == INDUCTION else {one: found for (one, target), found in by_target.items() if target == of}
    )
    own = measured[name]
    return Rung(
        **both, own=own.faithfulness, kl_interval=own.interval(STATISTICS["kl"]),
        r_interval=own.interval(STATISTICS["surprisal_correlation"]), kl_of_empty=measured[EMPTY].faithfulness.kl,
        kl_of_full=measured[FULL].faithfulness.kl, subnetwork=mask.checksum,
        places={PartName(part, layer).label: count.kept for (layer, part), count in mask.by_component().items()},
    )  # fmt: skip


def _steps(losses: Mapping[str, Measured]) -> tuple[Step, ...]:
    statistic = STATISTICS["mean_surprisal"]
    whole = losses[EMPTY].minus(losses[FULL], statistic)[0]
    found = []
    for ladder, names in (("free", FREE_STEPS), ("nested", NESTED_STEPS)):
        for before, name in pairwise(names):
            gain, low, high = losses[before].minus(losses[name], statistic)
            found.append(Step(ladder, before, name, gain, (low, high), gain / whole if whole > 0 else math.nan))
    return tuple(found)


def _overlaps(masks: Mapping[str, Subnetwork]) -> tuple[SharedWeights, ...]:
    pairs = [(a, b) for a, b in combinations(masks, 2) if masks[a].kept and masks[b].kept]
    rows = [{key: of["all"] for key, of in _numbers(masks[a], masks[b]).items()} for a, b in pairs]
    given = [a in _around(b) or b in _around(a) for a, b in pairs]
    logs = [math.nan if known else row["log10_p"] * math.log(10) for known, row in zip(given, rows, strict=True)]
    return tuple(
        SharedWeights(
            a, b, int(row["intersection"]), row["expected"], row["share_of_a_in_b"], row["share_of_b_in_a"],
            log_p / math.log(10),
        )
        for (a, b), row, log_p in zip(pairs, rows, holm(logs), strict=True)
    )  # fmt: skip


def _numbers(a: Subnetwork, b: Subnetwork) -> dict[str, dict[str, float]]:
    found = overlap(a, b)
    return {one.name: found.get(one.name) for one in found.quantities}


def _around(name: str) -> list[str]:
    """The masks that a mask was searched for in, from the innermost."""
    found = []
    while name in WITHIN:
        name = WITHIN[name]
        found.append(name)
    return found


def load_ladder(folder: str | os.PathLike[str]) -> Ladder:
    """Read the ladder that `find_ladder` wrote to a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.

    Example:
        >>> ladder = bc.load_ladder("runs/ladder")
        >>> ladder.to_dataframe()
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no ladder: it has no {_FILE}")
    remedy = "`ladder` with the same options writes it again"
    record = read_checked_json(path, remedy)
    with damaged(path, remedy):
        return Ladder.from_json(record)
