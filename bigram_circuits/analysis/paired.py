"""Several changes of a model, measured on the same prompts and compared in pairs.

Every change (a part ablated or added) is a job: one pass over the text, which gives a row of sums per prompt. It begins
at the first block that differs from the base's, where that can be done (`models/resuming.py`).
Intervals are paired bootstraps over prompts (Efron 1979): all jobs are resampled with the same prompts, so differences
between them have as little noise as possible. Matched random changes are the controls of every part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import Mask, masked, masks_exchanged
from bigram_circuits.measures import statistics
from bigram_circuits.measures.statistics import Statistic
from bigram_circuits.models.model import Model
from bigram_circuits.models.resuming import KnownPasses
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.tasks.task import Hooks, Task, measure, per_place

_DRAWS = 1000

Kept = Mask | None
"""What of a model is kept, or None for the full model."""


class Table:
    """Sums of several conditions on the same prompts, and their paired bootstrap draws."""

    def __init__(
        self, sums: Float[np.ndarray, "condition prompt column"], places: Mapping[tuple[str, str, int | None], int]
    ) -> None:
        """`places` maps a condition (base, part or "" for none, random draw or None) to its index in `sums`."""
        self.sums = sums
        self.places = places
        columns = sums.shape[2]
        together = np.moveaxis(sums, 0, 1).reshape(sums.shape[1], -1)
        self._draws = statistics.bootstrap(together, draws=_DRAWS).reshape(_DRAWS, len(sums), columns)
        self._whole = sums.sum(1)

    def prompts(self, base: str, name: str) -> Float[np.ndarray, "prompt column"]:
        """The sums of a condition by prompt."""
        return self.sums[self.places[base, name, None]]

    def randoms(self, base: str, name: str) -> list[int]:
        """The random draws that were measured for a part."""
        return [r for b, n, r in self.places if b == base and n == name and r is not None]

    def point(self, base: str, name: str, statistic: Statistic, random: int | None = None) -> float:
        """A statistic of a condition over all prompts."""
        return float(statistic(self._whole[self.places[base, name, random]]))

    def draws(
        self, base: str, name: str, statistic: Statistic, random: int | None = None
    ) -> Float[np.ndarray, " draw"]:
        """A statistic of a condition in every bootstrap draw."""
        return np.asarray(statistic(self._draws[:, self.places[base, name, random]]))

    def change(self, base: str, name: str, statistic: Statistic) -> tuple[float, float, float]:
        """The change of a statistic from the base to the changed part, with its 95% interval."""
        draws = self.draws(base, name, statistic) - self.draws(base, "", statistic)
        return (self.point(base, name, statistic) - self.point(base, "", statistic), *statistics.interval(draws))

    def random_change(self, base: str, name: str, statistic: Statistic) -> float:
        """The mean change over the matched random parts; nan if there are none."""
        points = [self.point(base, name, statistic, random) for random in self.randoms(base, name)]
        return float(np.mean(points)) - self.point(base, "", statistic) if points else math.nan

    def excess(self, base: str, name: str, statistic: Statistic) -> tuple[float, float, float]:
        """A statistic minus its mean over the matched random parts, with its 95% interval."""
        randoms = self.randoms(base, name)
        if not randoms:
            return (math.nan, math.nan, math.nan)
        point = self.point(base, name, statistic) - np.mean([self.point(base, name, statistic, r) for r in randoms])
        others = np.mean([self.draws(base, name, statistic, r) for r in randoms], axis=0)
        return (float(point), *statistics.interval(self.draws(base, name, statistic) - others))


def mean_loss(sums: Float[np.ndarray, "... column"]) -> Float[np.ndarray, "..."]:
    """Loss per scored place, nats."""
    return per_place(sums, "surprisal")


def mean_log_odds(sums: Float[np.ndarray, "... column"]) -> Float[np.ndarray, "..."]:
    """Log odds of right against wrong per scored place, nats."""
    return per_place(sums, "log_odds")


@dataclass(frozen=True)
class Job:
    """One pass over the text: a base, a base with a part changed, or with a matched random one in its place."""

    base: str
    """Its name, for example `full`."""
    name: str
    """Name of the part; empty for the base itself."""
    kept: Kept
    """What is kept."""
    hooks: Callable[[], Hooks | None] = lambda: None
    """Makes the forward hooks when the job is measured, with the model reduced to what is kept."""
    key: Any = None
    """Jobs with equal keys have equal sums and are measured once; None for the base itself."""
    random: int | None = None
    """Number of the random draw; None for the part itself."""
    first: int = 0
    """The first block whose output may differ from the base's."""


class PairedMeasurements:
    """Measures jobs, once for every key, and collects their sums; a context, at whose end the model is as it was."""

    def __init__(self, model: Model, task: Task, target: Any = None) -> None:
        self.model, self.task, self.target = model, task, target
        self._by_key: dict[Any, int] = {}
        self._sums: list[Float[np.ndarray, "prompt column"]] = []
        self._places: dict[tuple[str, str, int | None], int] = {}
        self._base: tuple[str, KnownPasses] | None = None
        self._masking = ExitStack()
        self._exchange: Callable[[Subnetwork | None], None] | None = None

    def __enter__(self) -> PairedMeasurements:
        return self

    def __exit__(self, *error: object) -> None:
        self._unmask()

    def measure(self, job: Job, bar: Any) -> None:
        """Measure a job unless one with the same key was measured; advances the bar."""
        key = (job.base, "") if job.key is None else job.key
        if key not in self._by_key:
            with self._reduced_to(job.kept):
                sums = measure(
                    self.model, self.task, target=self.target, hooks=job.hooks(), smallest=2, within=self._within(job)
                )
            self._by_key[key] = len(self._sums)
            self._sums.append(sums)
        bar.update(len(self.task))
        self._places[job.base, job.name, job.random] = self._by_key[key]

    def _reduced_to(self, kept: Kept) -> AbstractContextManager[Any]:
        """The model reduced to a mask; to a subnetwork it stays reduced until there is another mask."""
        if isinstance(kept, Circuit):
            self._unmask()
            return masked(self.model, kept)
        if self._exchange is None:
            self._exchange = self._masking.enter_context(masks_exchanged(self.model))
        self._exchange(kept)
        return nullcontext()

    def _unmask(self) -> None:
        self._masking.close()
        self._exchange = None

    def _within(self, job: Job) -> Callable[[int], AbstractContextManager[Any]]:
        """Within what a job's batches pass through the model: the outputs of a base's blocks are kept for its parts."""
        if isinstance(job.kept, Circuit):
            return nullcontext
        if job.name == "":
            passes = KnownPasses(self.model)
            self._base = (job.base, passes)
            return lambda index: passes.first_pass()
        if self._base is None or self._base[0] != job.base:
            return nullcontext
        known = self._base[1]
        return lambda index: known.again(index, job.first)

    def table(self) -> Table:
        """All measurements so far."""
        return Table(np.stack(self._sums), self._places)


def first_difference(mask: Kept, base: Kept) -> int:
    """The first block in which two masks differ; 0 if that is not told: for circuits, or without any difference."""
    if isinstance(mask, Circuit) or isinstance(base, Circuit) or mask is None:
        return 0
    different = (mask - base) | (base - mask) if base is not None else ~mask
    return min((layer for (layer, _), count in different.by_place().items() if count.kept), default=0)
