"""Several changes of a model measured on the same prompts, and compared in pairs.

Every change (a part taken away, or added) is a job: one pass over the text, which leaves a row of sums per prompt.
Intervals are paired bootstraps over prompts (Efron 1979): all jobs are resampled with the same prompts, so that a
difference between two has no more noise than it must. Matched random changes stand beside every part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bigram_circuits.analysis.conditions import reduced_to
from bigram_circuits.analysis.tasks import Hooks, Task, measure, per_place
from bigram_circuits.measures import statistics
from bigram_circuits.models.model import Model
from bigram_circuits.subnetwork import Subnetwork

_DRAWS = 1000

Kept = Subnetwork | None
"""The weights of a model that are kept, or None for all of them."""

Statistic = Callable[[Float[np.ndarray, "... column"]], Float[np.ndarray, "..."]]


class Table:
    """Sums of several conditions on the same prompts, and paired bootstrap draws of them."""

    def __init__(
        self, sums: Float[np.ndarray, "condition prompt column"], places: Mapping[tuple[str, str, int | None], int]
    ) -> None:
        """`places` tells where the condition (base, part or "" for none, random draw or None) is."""
        self.sums = sums
        self.places = places
        columns = sums.shape[2]
        together = np.moveaxis(sums, 0, 1).reshape(sums.shape[1], -1)
        self._draws = statistics.bootstrap(together, draws=_DRAWS).reshape(_DRAWS, len(sums), columns)
        self._whole = sums.sum(1)

    def prompts(self, base: str, name: str) -> Float[np.ndarray, "prompt column"]:
        """The sums of every prompt."""
        return self.sums[self.places[base, name, None]]

    def randoms(self, base: str, name: str) -> list[int]:
        """The random draws there are for a part."""
        return [r for b, n, r in self.places if b == base and n == name and r is not None]

    def point(self, base: str, name: str, statistic: Statistic, random: int | None = None) -> float:
        """A statistic over all prompts."""
        return float(statistic(self._whole[self.places[base, name, random]]))

    def draws(
        self, base: str, name: str, statistic: Statistic, random: int | None = None
    ) -> Float[np.ndarray, " draw"]:
        """A statistic in every bootstrap draw."""
        return np.asarray(statistic(self._draws[:, self.places[base, name, random]]))

    def change(self, base: str, name: str, statistic: Statistic) -> tuple[float, float, float]:
        """How much higher a statistic is with the part changed than in the base, and its 95% interval."""
        draws = self.draws(base, name, statistic) - self.draws(base, "", statistic)
        return (self.point(base, name, statistic) - self.point(base, "", statistic), *statistics.interval(draws))

    def random_change(self, base: str, name: str, statistic: Statistic) -> float:
        """The mean of that over the matched random ones; nan if there are none."""
        points = [self.point(base, name, statistic, random) for random in self.randoms(base, name)]
        return float(np.mean(points)) - self.point(base, "", statistic) if points else math.nan

    def excess(self, base: str, name: str, statistic: Statistic) -> tuple[float, float, float]:
        """How much higher a statistic is than the mean of the matched random ones, and its 95% interval."""
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
    """The part's name; empty for the base itself."""
    kept: Kept
    """The weights that the model is reduced to."""
    hooks: Callable[[], Hooks | None] = lambda: None
    """Makes the forward hooks, when it is time."""
    key: Any = None
    """Equal keys give equal sums, so they are measured once; None: the base's own."""
    random: int | None = None
    """Which random draw; None for the part itself."""


class PairedMeasurements:
    """Sums of every job, measured once for every key."""

    def __init__(self, model: Model, task: Task, target: Any = None) -> None:
        self.model, self.task, self.target = model, task, target
        self._by_key: dict[Any, int] = {}
        self._sums: list[Float[np.ndarray, "prompt column"]] = []
        self._places: dict[tuple[str, str, int | None], int] = {}

    def measure(self, job: Job, bar: Any) -> None:
        """Measure a job, unless an equal one has been; move the bar on."""
        key = (job.base, "") if job.key is None else job.key
        if key not in self._by_key:
            hooks = job.hooks()
            with reduced_to(self.model, job.kept):
                sums = measure(self.model, self.task, target=self.target, hooks=hooks, smallest=2)
            self._by_key[key] = len(self._sums)
            self._sums.append(sums)
        bar.update(len(self.task))
        self._places[job.base, job.name, job.random] = self._by_key[key]

    def table(self) -> Table:
        """All that was measured."""
        return Table(np.stack(self._sums), self._places)
