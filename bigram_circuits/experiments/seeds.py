"""One recipe with several seeds: how much everything that is measured depends on the seed, and what all seeds keep.

A seed changes the data order and the random numbers of the masking method, nothing else, so what differs between runs
of different seeds is the scatter of the method. One of them, that whose cross-entropy is the median, represents them:
it is a run like any other, and only it is analysed. The others say how far its numbers would have been different.

How many seeds keep a unit is set beside chance. If seed s kept k_s units of a matrix of N drawn at random, each unit
would be kept by j seeds with the probability that j of independent trials with success probabilities k_s / N succeed
(the Poisson binomial distribution), so N times that is the number of units that exactly j seeds are expected to keep.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import combinations
from operator import and_
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bigram_circuits.analysis.overlap import overlap
from bigram_circuits.evaluation import Evaluation, Measured, evaluated
from bigram_circuits.experiments.verdicts import Judged, judge_seeds, seed_name
from bigram_circuits.learning.callbacks import Callback
from bigram_circuits.learning.names import names_of
from bigram_circuits.learning.ranks import refuse_several
from bigram_circuits.learning.training import find_mask, identity_of, run_settings
from bigram_circuits.masking.apply import Mask
from bigram_circuits.measures.quantities import (
    CONTEXT_TOLD,
    CROSS_ENTROPY,
    FRACTION,
    KL,
    MEAN_SURPRISAL,
    SURPRISAL_CORRELATION,
    TOP1_AGREEMENT,
    Quantity,
)
from bigram_circuits.measures.results import Effects, Ends, effects_of, load_result_and_origin
from bigram_circuits.measures.statistics import STATISTICS, ContextTold, Statistic, interval
from bigram_circuits.measures.words import percent, rounded
from bigram_circuits.models.activations import check_tokens
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.recipe import Inputs, SparsifyConfig
from bigram_circuits.runs import InputCheck, Run, RunFolder
from bigram_circuits.runs.folder import MASKS, SEEDS, check_links, check_settings
from bigram_circuits.storage.files import damaged, remove_leftovers
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import check_no_link
from bigram_circuits.storage.typed import Record
from bigram_circuits.targets.base import Target, kl_of_best_constant, target_of
from bigram_circuits.text.corpus import Corpus

CORE = "core"
"""The row of what all seeds keep."""
_RECOVERED = Quantity(
    "recovered", "share", "Of the full model's gain in cross-entropy over the empty one, what is kept."
)
_RISE = Quantity("rise_without", "nats", "Rise of the full model's next-token loss without what is kept.")
_RISE_RANDOM = Quantity(
    "rise_without_random", "nats", "The same rise without as many at random, the mean of the draws."
)
_R_RANDOM = Quantity("r_of_random", "", "Pearson r with the target of as many at random, the mean of the draws.")
_CE_RANDOM = Quantity("cross_entropy_of_random", "nats", "Cross-entropy of as many at random, the mean of the draws.")
_ONE = (SURPRISAL_CORRELATION, KL, CROSS_ENTROPY, MEAN_SURPRISAL, TOP1_AGREEMENT)  # of one masked model
_COMPOSED = (CONTEXT_TOLD, _RECOVERED, _RISE, _RISE_RANDOM, _R_RANDOM, _CE_RANDOM)
_SPREAD = (
    Quantity("mean", "", "Mean over seeds."),
    Quantity("sd", "", "Standard deviation over seeds."),
    Quantity("lowest", "", "Minimum over seeds."),
    Quantity("highest", "", "Maximum over seeds."),
)
_REMEDY = "`find` with the same --seeds and --fresh measures it again"
_FEWEST = 2  # seeds, to have a spread


@dataclass(frozen=True)
class Spread:
    """A number over several seeds."""

    mean: float
    """Mean over seeds."""
    deviation: float
    """Sample standard deviation; nan for fewer than two."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""

    @classmethod
    def of(cls, values: Sequence[float | int]) -> Spread:
        """The spread of at least one value; nan if one of them is."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), deviation, float(np.min(values)), float(np.max(values)))


def spread_of(rows: Mapping[str, Sequence[float | int]]) -> Effects:
    """Mean, standard deviation, minimum and maximum of each number, given by seed."""
    ends = [Spread.of(values) for values in rows.values()]
    values = np.array([[getattr(one, part.name) for one in ends] for part in fields(Spread)], dtype=float)
    none, n = np.full_like(values, np.nan), len(next(iter(rows.values())))
    return Effects("Spread over seeds", _SPREAD, "number", tuple(rows), values, none, none, notes={"seeds": n})


def overlaps_of(masks: Mapping[str, Mask]) -> Effects:
    """Overlap of each pair with the exact null, overall and by component; empty masks are left out and noted."""
    some = {name: one for name, one in masks.items() if one.kept}
    pairs = {f"{a}, {b}": overlap(some[a], some[b], by="component") for a, b in combinations(some, 2)}
    names = tuple(f"{pair}: {name}" for pair, one in pairs.items() for name in one.names)
    quantities = next((one.quantities for one in pairs.values()), ())
    nothing = np.zeros((len(quantities), 0))
    values, low, high = (
        np.concatenate([nothing, *(getattr(one, key) for one in pairs.values())], axis=1)
        for key in ("values", "low", "high")
    )
    notes = {"pairs": list(pairs), "kept_nothing": [name for name, one in masks.items() if not one.kept]}
    return Effects("Overlap between seeds", quantities, "pair", names, values, low, high, notes=notes)


def kept_by(masks: Sequence[Mask]) -> Effects:
    """How many units are kept by exactly j of n masks, beside what chance would give for masks of these sizes.

    Chance: every mask drawn at random among those that keep as many units of every matrix (or hook point), each
    independently of the others. The expectation is exact (see the module's docstring).

    Returns:
        A row for every j from 0 to n, named by the number.
    """
    found, expected, n = np.zeros(len(masks) + 1), np.zeros(len(masks) + 1), len(masks)
    kept = [one.by_name() for one in masks]
    for name, count in kept[0].items():
        times = torch.stack([one[name].flatten() for one in masks]).sum(0)
        found += torch.bincount(times, minlength=n + 1).numpy()
        expected += count.total * _successes([one[name].fraction for one in kept])
    units = masks[0].units
    quantities = (
        Quantity("found", units, f"The {units} that exactly so many seeds keep."),
        Quantity("expected", "", "The number that chance would give, for masks of these sizes in every matrix."),
    )
    values = np.stack([found, expected])
    none = np.full_like(values, np.nan)
    return Effects("Kept by how many seeds", quantities, "seeds", tuple(map(str, range(n + 1))), values, none, none)


def _successes(shares: Sequence[float]) -> Float[np.ndarray, " successes"]:
    """Probabilities of 0 to n successes in independent trials with these probabilities (Poisson binomial)."""
    found = np.ones(1)
    for share in shares:
        found = np.convolve(found, [1 - share, share])
    return found


@dataclass(frozen=True)
class _About(Record):
    """What the results over seeds are of, as `runs.json` notes it."""

    noun: str
    units: str
    seeds: tuple[int, ...]
    representative: int
    random_seeds: int
    """Number of random controls of each."""
    masks: tuple[str, ...]
    """Checksum of the masks of each."""
    core: str
    """Checksum of the core."""


@dataclass(frozen=True)
class Seeds:
    """One recipe with several seeds: what each found, how much that differs, and what all of them keep.

    Example:
        >>> several = bc.over_seeds(model, target, corpus, config, seeds=2, random_seeds=1)
        >>> several.spread.get("sd")["kl"] >= 0  # standard deviation over seeds, of every number
        True
    """

    runs: Effects
    """A row for each seed (`seed 0`): what it keeps and how faithful that is, with 95% intervals over text. Beside
    what `Faithfulness` has: the share of the context told, the share of the full model's gain that is kept
    (`Evaluation.recovered`), the rise of the full model's loss without it, and the means over the random controls."""
    spread: Effects
    """Every number over seeds: mean, standard deviation, minimum, maximum."""
    overlaps: Effects
    """Overlap of each pair of seeds' masks, overall and by component, with the exact null."""
    kept_by: Effects
    """How many weights, or nodes, exactly 0, 1, ... seeds keep, beside what chance would give."""
    core: Mask
    """What all seeds keep."""
    alone: Effects
    """What the core alone does: a row with the numbers of `runs`."""
    representative: int
    """The seed that stands for all: that whose cross-entropy is the median, the lower of the two middle ones if their
    number is even."""
    masks: Mapping[str, Mask]
    """What each seed found, by its name in `runs`."""
    of: Origin | None = None
    """The mask of the representative and the text that all were measured on, and the run if there is one."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return _about(self.runs).seeds

    @property
    def judged(self) -> Judged:
        """Whether seeds keep the same more than chance would have it, in words."""
        return judge_seeds(self.runs, self.overlaps)

    @property
    def why(self) -> str:
        """Which seed represents the others and why, as a sentence."""
        return (
            f"Seed {self.representative} represents them: of {len(self.masks)} seeds, its cross-entropy is the median"
            f"{'' if len(self.masks) % 2 else ' (the lower of the two middle ones)'}."
        )

    @property
    def core_words(self) -> str:
        """How much all seeds keep, beside chance, and what that does alone, as sentences."""
        n, units = len(self.masks), self.core.units
        expected = self.kept_by.get("expected")[str(n)]
        alone, own = self.alone.get("cross_entropy")[CORE], self.spread.get("mean")["cross_entropy"]
        return (
            f"All {n} seeds keep {self.core.kept:,} {units} ({percent(self.core.fraction)}); by chance it would be "
            f"{expected:,.1f}. With only these, the cross-entropy is {rounded(alone)} nats, that of the seeds "
            f"{rounded(own)} on average."
        )

    def range(self, quantity: str) -> tuple[float, float]:
        """The smallest and the largest value of a quantity over seeds."""
        return self.spread.get("lowest")[quantity], self.spread.get("highest")[quantity]

    def interval(self, quantity: str) -> tuple[float, float]:
        """The representative's 95% interval of a quantity over text; (nan, nan) where there is none."""
        at = self.runs.quantities.index(self.runs.quantity(quantity)), self.seeds.index(self.representative)
        return float(self.runs.low[at]), float(self.runs.high[at])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the results to the folder of the run that is of these seeds, beside the runs of all of them.

        Raises:
            OSError: If it cannot be written.
        """
        for name in _RESULTS:
            getattr(self, name).save(Path(folder) / SEEDS / f"{name}.json", self.of)
        self.core.save(Path(folder) / SEEDS / _CORE_FILE)

    def __str__(self) -> str:
        names = [one.name for one in self.runs.quantities]
        columns = [place for place, name in enumerate(names) if name in _SHOWN]
        head = f"{'':<12}" + "".join(f"{_SHOWN[names[place]]:>10}" for place in columns)
        rows = dict(zip(self.runs.names, self.runs.values.T, strict=True))
        rows |= {one.name: values for one, values in zip(self.spread.quantities, self.spread.values, strict=True)}
        rows |= {CORE: self.alone.values[:, 0]}
        lines = [
            f"{name:<12}" + "".join(f"{_cell(names[place], row[place]):>10}" for place in columns)
            for name, row in rows.items()
        ]
        found, expected = self.kept_by.get("found"), self.kept_by.get("expected")
        times = [f"by {j} of {len(self.masks)}: {found[j]:,.0f} ({expected[j]:,.1f})" for j in found if j != "0"]
        return "\n".join([
            head, *lines, "", _LEGEND, "", self.judged.says,
            f"{self.core.units.capitalize()} kept (expected by chance): {'; '.join(times)}.",
            self.core_words, self.why,
        ])  # fmt: skip


_SHOWN = {
    "kept": "kept", "fraction": "share", "surprisal_correlation": "r", "kl": "KL", "cross_entropy": "CE",
    "mean_surprisal": "loss", "top1_agreement": "top-1", "context_told": "told", "recovered": "recovered",
    "rise_without": "rise", "r_of_random": "random r",
}  # fmt: skip
"""The columns of the table in text."""
_LEGEND = (
    "told: share of the context's information. recovered: share of the full model's gain over the empty one. rise: of "
    "the full model's loss without it, nats."
)
_RESULTS = ("runs", "spread", "overlaps", "kept_by", "alone")
_CORE_FILE = "core.safetensors"


def _cell(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return (
        f"{value:,.{0 if value == round(value) else 1}f}"
        if name == "kept"
        else (percent(value) if name == "fraction" else rounded(value))
    )


def _about(runs: Effects) -> _About:
    return _About.from_json(dict(runs.notes))


def load_seeds(folder: str | os.PathLike[str], run: Run | None = None) -> Seeds | None:
    """Read the results over seeds from the folder of a run that is of several; None if it is of one.

    Args:
        folder: The run's folder.
        run: The run that they must be of; None: any.

    Raises:
        ValueError: If a file is damaged, a symbolic link, or of another run.

    Example:
        >>> bc.load_seeds("runs/short") is None  # this run is of one seed
        True
    """
    place = Path(folder) / SEEDS
    check_no_link(place)
    paths = {name: place / f"{name}.json" for name in _RESULTS}
    if not all(path.is_file() for path in paths.values()):
        return None
    parts: dict[str, Any] = {}
    origins: dict[str, Origin | None] = {}
    for name, path in paths.items():
        parts[name], origins[name] = load_result_and_origin(path, follow=False)
        if run is not None:
            run.check_origin(path, origins[name], _REMEDY)
        if not isinstance(parts[name], Effects):
            raise ValueError(f"{str(path)!r} holds a result of another kind, not one over seeds; {_REMEDY}")
    with damaged(paths["runs"], _REMEDY):
        about = _about(parts["runs"])
        names = tuple(map(seed_name, about.seeds))
        if about.noun not in MASKS or parts["runs"].names != names or about.representative not in about.seeds:
            raise ValueError("its notes are not those of its rows")
    core = MASKS[about.noun].load(place / _CORE_FILE, follow_links=False)
    masks = {name: _mask_of(place / _folder_name(seed)) for name, seed in zip(names, about.seeds, strict=True)}
    if (core.checksum, *(one.checksum for one in masks.values())) != (about.core, *about.masks):
        raise ValueError(f"{str(place)!r} holds other masks than those that were measured; {_REMEDY}")
    return Seeds(**parts, core=core, representative=about.representative, masks=masks, of=origins["runs"])


def _mask_of(folder: Path) -> Mask:
    """What a run found."""
    check_no_link(folder)
    return RunFolder(folder).mask()


def _folder_name(seed: int) -> str:
    return f"seed-{seed}"


@uses_model
def over_seeds(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    seeds: int = 5,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    random_seeds: int = 3,
    rebuild: Inputs | None = None,
    callbacks: Sequence[Callback] = (),
    check_memory: str = "warn",
    checked: InputCheck | None = None,
    tell: Callable[[str], None] | None = None,
) -> Seeds:
    """Learn the same recipe with several seeds, and measure how much everything depends on the seed.

    Args:
        model: From `load_model`.
        target: As for `find_subnetwork`; of a task, a `TaskTarget`.
        corpus: Masks are learned on its training part and measured on its held-out part.
        config: The recipe, of weights or of nodes; `SparsifyConfig()` by default. Its seed is the first.
        seeds: Number of seeds, at least 2.
        run_dir: The folder of a run that is of several seeds: the runs of all of them in `seeds/seed-0` and so on, each
            with its evaluation; the results over seeds in `seeds/`; and in the folder itself a copy of the run that
            represents them. The same call goes on where it was interrupted.
        resume: False starts all of them over.
        random_seeds: Number of matched random controls of each seed.
        rebuild: As for `find_subnetwork`.
        callbacks: As for `find_subnetwork`; each sees the steps of all seeds.
        check_memory: As for `find_subnetwork`.
        checked: From `check_inputs`; recorded in the folders that are created.
        tell: Called with a line of text for every seed, for example `print`.

    Raises:
        ValueError: If there are fewer than two seeds, nothing is held out, `run_dir` holds anything else (also the run
            of one seed alone, or of another number of seeds); or as `find_subnetwork`.
        MemoryError: As `find_subnetwork`.
        OSError: As `find_subnetwork`.

    Example:
        >>> several = bc.over_seeds(model, target, corpus, config, seeds=2, random_seeds=1)
        >>> print(several)  # a row for each seed, the spread, the overlap, and what all of them keep
    """
    refuse_several("over_seeds")
    if type(seeds) is not int or seeds < _FEWEST:
        raise ValueError(f"a spread needs at least {_FEWEST} seeds, not {seeds!r}")
    config = config or SparsifyConfig()
    target = target_of(target, model)
    check_tokens(model, corpus.held_out)
    recipes = {seed: replace(config, seed=seed) for seed in range(config.seed, config.seed + seeds)}
    job = _Job(
        model, target, corpus, random_seeds, rebuild or names_of(model, target, corpus), callbacks, check_memory,
        checked, tell or (lambda line: None),
    )  # fmt: skip
    if run_dir is None:
        return job.seeds(recipes, None)
    folder = RunFolder(Path(run_dir))
    _check_folder(folder.path, model, target, corpus, recipes)
    with folder.lock():
        _check_folder(folder.path, model, target, corpus, recipes)  # again: another process may have been at work
        if not resume:
            folder.discard()
        remove_leftovers(folder.path / SEEDS)
        found = load_seeds(folder.path)
        if found is not None and found.seeds != tuple(recipes):
            there = f"{found.seeds[0]} to {found.seeds[-1]}"
            wanted = f"{config.seed} to {config.seed + seeds - 1}"
            raise ValueError(f"{str(folder.path)!r} is of seeds {there}, not {wanted}: choose another folder")
        is_new = found is None or _about(found.runs).random_seeds != random_seeds
        if is_new:
            found = job.seeds(recipes, folder.path / SEEDS)
            found.save(folder.path)
        assert found is not None, "it was measured"
        if is_new or not folder.is_finished:
            folder.take(RunFolder(folder.path / SEEDS / _folder_name(found.representative)))
    return found


def _check_folder(
    path: Path, model: Model, target: Target, corpus: Corpus, recipes: Mapping[int, SparsifyConfig]
) -> None:
    """Raise ValueError if a folder holds anything but the runs of some of these seeds."""
    check_links(path)
    settings = run_settings(model, target, corpus, next(iter(recipes.values())))
    wanted = [replace(settings, recipe=recipe) for recipe in recipes.values()]
    if check_settings(path, wanted, SEEDS) and not (path / SEEDS).is_dir():
        raise ValueError(f"{str(path)!r} holds the run of one seed, not of {len(recipes)}: choose another folder")


@dataclass(frozen=True)
class _Job:
    """What all seeds share."""

    model: Model
    target: Target
    corpus: Corpus
    random_seeds: int
    rebuild: Inputs | None
    callbacks: Sequence[Callback]
    check_memory: str
    checked: InputCheck | None
    tell: Callable[[str], None]

    def seeds(self, recipes: Mapping[int, SparsifyConfig], folder: Path | None) -> Seeds:
        """Learn and measure with every seed."""
        masks: dict[str, Mask] = {}
        rows: dict[str, list[Ends]] = {}
        told = ContextTold(kl_of_best_constant(self.target, self.corpus.held_out))
        for seed, recipe in recipes.items():
            name, run = seed_name(seed), None
            if folder is not None:
                run = self._opened(folder / _folder_name(seed), recipe)
            mask = find_mask(
                self.model, self.target, self.corpus, recipe, run_dir=run and run.path, callbacks=self.callbacks,
                check_memory=self.check_memory,
            ).mask  # fmt: skip
            evaluation, rows[name] = self._measured(mask, told)
            if run is not None:
                with run.lock():
                    run.write_evaluation(evaluation, identity_of(self.corpus))
            masks[name] = mask
            own = evaluation.subnetwork
            self.tell(f"{name}: {own.kept:,} {mask.units} kept, cross-entropy {own.cross_entropy:.3f} nats")
        core = reduce(and_, masks.values()).named(f"what {len(masks)} seeds keep")
        quantities = (Quantity("kept", core.units, f"The {core.units} that are kept."), FRACTION, *_ONE, *_COMPOSED)
        runs = effects_of("The same recipe with several seeds", quantities, "seed", rows)
        alone = effects_of("What all seeds keep, alone", quantities, CORE, {CORE: self._measured(core, told)[1]})
        losses = dict(zip(recipes, runs.get("cross_entropy").values(), strict=True))
        representative = sorted(losses, key=losses.__getitem__)[(len(losses) - 1) // 2]
        checksums = tuple(one.checksum for one in masks.values())
        about = _About(
            core.noun, core.units, tuple(recipes), representative, self.random_seeds, checksums, core.checksum
        )
        name, text = seed_name(representative), self.corpus
        run_of = None if folder is None else RunFolder(folder / _folder_name(representative)).id
        return Seeds(
            replace(runs, notes=about.to_json()),
            spread_of(dict(zip((one.name for one in quantities), runs.values.tolist(), strict=True))),
            overlaps_of(masks), kept_by(list(masks.values())), core, alone, representative, masks,
            Origin(run_of, masks[name].checksum, text.fingerprint, text.source),
        )  # fmt: skip

    def _opened(self, path: Path, recipe: SparsifyConfig) -> RunFolder:
        """The folder of one seed's run, which is created if it is not there."""
        check_no_link(path)
        settings = run_settings(self.model, self.target, self.corpus, recipe)
        return RunFolder.open(path, settings, rebuild=self.rebuild, checked=self.checked)

    def _measured(self, mask: Mask, told: ContextTold) -> tuple[Evaluation, list[Ends]]:
        """The evaluation of a mask, and its row: the quantities of `Seeds.runs`."""
        evaluation, found = evaluated(
            self.model, mask, self.target, self.corpus.held_out, seeds=self.random_seeds
        )  # fmt: skip
        own, full, empty, without = (found[name] for name in ("subnetwork", "full", "empty", "complement"))
        drawn = [found[f"random {seed}"] for seed in range(self.random_seeds)]
        left = [found[f"full - random {seed}"] for seed in range(self.random_seeds)]
        loss, cross_entropy, r = (STATISTICS[name] for name in ("mean_surprisal", "cross_entropy", _ONE[0].name))
        composed = [
            _ends(told, own),
            _ends(lambda *rows: _share_kept(*map(cross_entropy, rows)), own, full, empty),
            _ends(lambda a, b: loss(a) - loss(b), without, full),
            _ends(lambda whole, *rows: _mean_of(loss, rows) - loss(whole), full, *left),
            _ends(lambda *rows: _mean_of(r, rows), *drawn),
            _ends(lambda *rows: _mean_of(cross_entropy, rows), *drawn),
        ]
        sizes = [(float(number), math.nan, math.nan) for number in (mask.kept, mask.fraction)]
        return evaluation, [*sizes, *(_ends(STATISTICS[one.name], own) for one in _ONE), *composed]


_Sums = Float[np.ndarray, "... column"]


def _ends(statistic: Callable[..., Float[np.ndarray, "..."]], *measured: Measured) -> Ends:
    """A statistic of what was measured on the same text, with its 95% paired bootstrap interval."""
    value = float(statistic(*(one.sums.sum(0) for one in measured)))
    return (value, *interval(statistic(*(one.draws for one in measured))))


def _mean_of(statistic: Statistic, rows: Sequence[_Sums]) -> Float[np.ndarray, "..."]:
    return np.asarray(np.mean([statistic(one) for one in rows], axis=0))


def _share_kept(
    own: Float[np.ndarray, "..."], full: Float[np.ndarray, "..."], empty: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """(empty - own) / (empty - full) of cross-entropies; nan where the full model gains nothing."""
    gain = empty - full
    return np.where(gain > 0, (empty - own) / np.where(gain > 0, gain, 1.0), np.nan)
