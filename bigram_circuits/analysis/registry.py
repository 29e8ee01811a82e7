"""The analyses that `analyze` runs: each is registered in its own module, and no other module needs to know of it.

@in_suite("by_layer")
def _(subject: Subject) -> Result:
    return by_layer(subject.subnetwork)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from bigram_circuits.analysis.conditions import Conditions, conditions
from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import Mask
from bigram_circuits.masking.effects import Scores, node_effects, strongest
from bigram_circuits.measures.results import Result
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import UNITS
from bigram_circuits.names import head_label, in_block, neuron_label
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.tasks.task import Task
from bigram_circuits.text.corpus import Corpus, spread

TOKENS = 5 << 12
"""Held-out tokens to measure layers on."""
SWEEP_TOKENS = 3 << 10
"""Held-out tokens to measure each ablation on."""
FIT_TOKENS = 1 << 14
"""Training tokens to fit affine maps on."""
_PROMPT_TOKENS = 16  # held-out tokens that are shown one by one


@dataclass(frozen=True, eq=False)
class Subject:
    """The checked inputs of an analysis, and how much text to use."""

    model: Model = field(repr=False)
    """From `load_model`."""
    subnetwork: Mask
    """The subnetwork or circuit to analyse."""
    target: Any
    """The target it was learned for."""
    corpus: Corpus
    """The text."""
    seed: int = 0
    """Seed of the matched random subnetworks."""
    tokens: int = TOKENS
    """Maximum number of held-out tokens to measure layers on."""
    sweep_tokens: int = SWEEP_TOKENS
    """Maximum number of held-out tokens to measure each ablation on."""
    fit_tokens: int = FIT_TOKENS
    """Maximum number of training tokens to fit affine maps on."""
    task: Task | None = None
    """The held-out rows, if the target is of a task."""

    @cached_property
    def prompt(self) -> Integer[np.ndarray, " position"]:
        """The first tokens of the held-out text."""
        return np.asarray(self.corpus.held_out[0][:_PROMPT_TOKENS]).astype(np.int64)

    @cached_property
    def prompt_tokens(self) -> Integer[Tensor, "1 position"]:
        """`prompt` as a batch of one, on the model's device."""
        return torch.from_numpy(self.prompt)[None].to(self.model.cfg.device)

    @cached_property
    def conditions(self) -> Conditions:
        """The conditions to compare."""
        return conditions(self.subnetwork, seed=self.seed)

    @cached_property
    def sweep_text(self) -> Integer[np.ndarray, "sequence position"]:
        """The text that each ablation is measured on."""
        return self.sample(self.sweep_tokens)

    @cached_property
    def largest(self) -> Mask:
        """The largest weights, as many in every matrix; of a circuit, the nodes with the largest effects."""
        if isinstance(self.subnetwork, Circuit):
            return strongest(self._effects, self.subnetwork)
        return Subnetwork.magnitude(self.model, like=self.subnetwork)

    @cached_property
    def _effects(self) -> Scores:
        """What each node of the circuit contributes to the target, by the gradient of its gate in the full model."""
        assert isinstance(self.subnetwork, Circuit), "asked for circuits alone"
        return node_effects(self.model, self.subnetwork, self.target, self.sample(self.sweep_tokens))

    def kept_nodes(self, unit: str, most: int) -> list[str]:
        """Labels of at most so many nodes of a unit that the circuit keeps: those with the largest effects first."""
        circuit = self.subnetwork
        assert isinstance(circuit, Circuit), "asked for circuits alone"
        label = {"head": head_label, "neuron": neuron_label}[unit]
        found: dict[str, float] = {}
        for layer in [layer for layer, of in circuit.by_place() if of == unit]:
            name = in_block(layer, UNITS[unit])
            kept = circuit[name].nonzero().flatten().tolist()
            found |= {label(layer, index): float(self._effects[name][index]) for index in kept}
        return sorted(found, key=lambda one: -found[one])[:most]

    def sample(self, tokens: int) -> Integer[np.ndarray, "sequence position"]:
        """At most this many tokens of the held-out text, evenly spread."""
        return spread(self.corpus.held_out, tokens)


Step = Callable[[Subject], Result | Mapping[str, Any]]
"""Returns a result, which takes the name of the step, or several results by name."""
ANALYSES: dict[str, Step] = {}
"""The steps registered so far; `analyses` returns all of them, in order."""


def in_suite(name: str) -> Callable[[Step], Step]:
    """Register a step of `analyze` under a name.

    Raises:
        ValueError: If the name is taken.
    """

    def register(step: Step) -> Step:
        if name in ANALYSES:
            raise ValueError(f"there is an analysis {name!r} already, in {ANALYSES[name].__module__}")
        ANALYSES[name] = step
        return step

    return register


def analyses() -> dict[str, Step]:
    """Every step of `analyze`, ordered by module name and, within a module, by definition."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(ANALYSES.items(), key=lambda item: item[1].__module__))
