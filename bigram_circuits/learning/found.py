"""The result of learning: the subnetwork, and how it was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from bigram_circuits.circuit import Circuit
from bigram_circuits.evaluation import SoftHardGap
from bigram_circuits.masking.apply import Mask
from bigram_circuits.measures import html
from bigram_circuits.measures.quantities import CROSS_ENTROPY, FRACTION, Quantity
from bigram_circuits.measures.results import Curves
from bigram_circuits.measures.words import sentence
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.runs import Outcome, PolishRecord, Rollback, StepRecord, cautions, why_stopped
from bigram_circuits.subnetwork import Subnetwork

F = TypeVar("F", bound="Found")

LEARNED = (FRACTION, CROSS_ENTROPY, Quantity("undecided", "share", "Share of the gates between 0.1 and 0.9."))
"""The quantities that `plot` can show."""


@dataclass(frozen=True)
class Found:
    """The result of learning a mask."""

    mask: Mask
    """What is kept: everything whose hard gate is open, after polishing if the recipe asks for it."""
    history: list[StepRecord] = field(repr=False)
    """One record for each step of the last attempt."""
    config: SparsifyConfig
    """The recipe it was found with."""
    stopped_because: str
    """`decided` (few gates were undecided), `planned` (the last step was done, with gates that are the mask itself),
    `max_steps` (it was done with soft gates), and, after the last retry, `unstable`."""
    seconds: float
    """Time spent learning, in seconds."""
    gap: SoftHardGap | None = None
    """Cross-entropy with the last soft gates and with the mask made of them; None if an older run did not record it."""
    rollbacks: tuple[Rollback, ...] = ()
    """Every time the loss was not finite or exploded. The abandoned steps are not in `history`."""
    attempts: int = 1
    """Number of data orders tried."""
    polish: PolishRecord | None = None
    """What polishing changed; None if the recipe does not ask for it."""

    @classmethod
    def of_run(cls: type[F], mask: Mask, history: Sequence[StepRecord], config: SparsifyConfig, outcome: Outcome) -> F:
        """Restore the result from what a run folder holds; the history is that of the last attempt."""
        last = [record for record in history if record.attempt == outcome.attempts - 1]
        return cls(
            mask, last, config, outcome.stopped_because, outcome.seconds, outcome.soft_hard, outcome.rollbacks,
            outcome.attempts, outcome.polish,
        )  # fmt: skip

    @property
    def outcome(self) -> Outcome:
        """How learning ended, as recorded in a run folder."""
        return Outcome(self.stopped_because, self.seconds, self.attempts, self.gap, self.rollbacks, self.polish)

    @property
    def why(self) -> str:
        """Why learning stopped, as a phrase."""
        return why_stopped(self.outcome, self.config)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What the records of learning warn of, a phrase each: a run too short, or what hardening changed."""
        return cautions(self.history, self.outcome, self.config)

    def plot(self, quantity: str = "fraction") -> Any:
        """A plotly figure of a quantity of the history, step by step: `fraction`, `cross_entropy`, `undecided`."""
        values = np.array([[[record[one.name] for record in self.history]] for one in LEARNED], dtype=float)
        steps = tuple(record.step for record in self.history)
        nothing = np.full_like(values, np.nan)
        return Curves("Learning", LEARNED, "step", steps, (self.mask.noun,), values, nothing, nothing).plot(quantity)

    def _repr_html_(self) -> str:
        """HTML for notebooks: how learning ended, and the subnetwork found."""
        last = self.history[-1].cross_entropy if self.history else math.nan
        says = (
            f"Stopped after {len(self.history):,} steps: {self.why}. "
            f"Cross-entropy at the last step: {last:.3f} nats. Recipe: {self.config.method.replace('_', ' ')}, "
            f"sparsity weight {self.config.sparsity_weight:g}, seed {self.config.seed}."
        )
        shown = self.mask._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return html.summary(f"Found {self.mask.noun}", [says, *map(sentence, self.cautions)], shown)


class FoundSubnetwork(Found):
    """The result of `find_subnetwork`.

    Example:
        >>> print(f"{found.subnetwork.fraction:.2f}")  # what its recipe asks for
        0.05
        >>> found.plot("cross_entropy")  # the loss by step
    """

    @property
    def subnetwork(self) -> Subnetwork:
        """The weights whose hard gate is open, after polishing if the recipe asks for it."""
        assert isinstance(self.mask, Subnetwork), "weights were learned"
        return self.mask


class FoundCircuit(Found):
    """The result of `find_circuit`.

    Example:
        >>> heads = bc.find_circuit(model, target, corpus, config, units="head", target_fraction=0.5)
        >>> heads.circuit.nodes  # their labels: L0H0, ...
    """

    @property
    def circuit(self) -> Circuit:
        """The nodes whose hard gate is open."""
        assert isinstance(self.mask, Circuit), "nodes were learned"
        return self.mask


def kind_of_found(mask: Mask) -> type[FoundSubnetwork] | type[FoundCircuit]:
    """The class of results that hold a mask of this kind."""
    return FoundCircuit if isinstance(mask, Circuit) else FoundSubnetwork
