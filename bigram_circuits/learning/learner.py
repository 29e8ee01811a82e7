"""The learner: gates, their optimizer, and the states to resume from and to roll back to.

A checkpoint holds exactly what `Learner.pack` returns. Every step is a function of that state, the step number and the
records of earlier steps, so a run resumed from a checkpoint ends in the same mask, bit for bit, as one that was never
interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.learning.ranks import Ranks
from bigram_circuits.learning.schedules import has_fallen, head_start
from bigram_circuits.masking.apply import Mask
from bigram_circuits.masking.candidates import Apart, Candidates
from bigram_circuits.masking.gates import Adversary
from bigram_circuits.masking.parted import Parted
from bigram_circuits.models.model import Model
from bigram_circuits.recipe import METHODS, SparsifyConfig
from bigram_circuits.runs import Checkpoint, StepRecord

_LOW_DECAY = 0.99  # at most: a bfloat16 second moment cannot change by a thousandth of its value
_GOOD_EVERY = 200  # steps between the states kept in memory for rollbacks
_STATES: Mapping[type[torch.optim.Optimizer], tuple[str, tuple[str, ...]]] = {
    torch.optim.AdamW: ("adam", ("exp_avg", "exp_avg_sq")),
    torch.optim.SGD: ("sgd", ("momentum_buffer",)),
}
"""By optimizer: the prefix of its state in a checkpoint, and what it keeps for every score."""
_SEEDS_APART = 1_000_003  # between the seeds of successive attempts


class Learner:
    """The gates of one attempt, and all state that changes while they are learned."""

    def __init__(
        self,
        candidates: Candidates,
        config: SparsifyConfig,
        within: Mask | None = None,
        start: Checkpoint | None = None,
        apart: Apart | None = None,
        *,
        by_block: bool = False,
    ) -> None:
        """Start from a checkpoint, or from scratch; `by_block` is for learning that is `sharded`."""
        start = start or Checkpoint({}, 0, 0, 0.0)
        self.config, self.start, self._candidates, self._apart = config, start, candidates, apart
        self.seed = config.seed + _SEEDS_APART * start.attempt
        """Seed of the attempt's data order and of the method's random numbers."""
        self.gates, self.wanted = candidates.gates(config, self.seed, within, apart, by_block=by_block)
        self._n_possible = sum(int(one.detach().isfinite().sum()) for one in self.gates.scores.tensors)
        self.share = None if self.wanted is None else max(self.wanted, 1) / self.gates.n_weights
        """Share of the gated weights to keep in the end; None if it is not fixed."""
        decay = min(config.second_moment_decay, _LOW_DECAY) if config.low_memory else config.second_moment_decay
        self._rate = rate_after(config, len(start.rollbacks))
        self._decay = decay
        self.optimizer = self.gates.optimizer(config, self._rate, decay)
        self._kind, self._moments = _STATES[type(self.optimizer)]
        self.gates.adversary = Adversary(self.gates.scores) if config.worst_case else None
        self._good = self._unpack(start)
        self._began = time.monotonic() - start.seconds

    @contextmanager
    def sharded(self, model: Model, ranks: Ranks) -> Iterator[None]:
        """Within the `with` block, each process keeps a share of weights, scores and optimizer state."""
        from bigram_circuits.learning.sharding import sharded

        moments = [self.optimizer.state.pop(one, {}) for one in self.gates.scores.tensors]
        with sharded(model, self.gates, ranks) as scores:
            self.optimizer = self.gates.optimizer(self.config, self._rate, self._decay)
            for own, share in zip(scores.tensors, scores.shares, strict=True):
                state = moments.pop(0)
                self.optimizer.state[own] = {n: t if n == "step" else t[share].clone() for n, t in state.items()}
            kept = {name: scores.own(t) if t.ndim else t for name, t in self._good.tensors.items()}
            self._good = replace(self._good, tensors=kept)
            yield

    @property
    def seconds(self) -> float:
        """Time spent learning, including before the checkpoint, in seconds."""
        return time.monotonic() - self._began

    @property
    def device(self) -> torch.device:
        """The device that the model reads tokens on."""
        return self._candidates.device

    @property
    def good(self) -> Checkpoint:
        """The last good state, to roll back to; if it is `sharded`, all processes have to ask."""
        return replace(self._good, tensors=self._joined(self._good.tensors, everywhere=True))

    def remember(self, step: int) -> None:
        """At regular intervals, keep the state before a step as one to roll back to."""
        if step and step % _GOOD_EVERY == 0:
            self._good = replace(self.start, tensors=self._tensors(), step=step, seconds=self.seconds)

    def harden(self, step: int, due: float | None) -> None:
        """Set gates and learning rate for a step; `due` is the share of gated weights to be open, None if not fixed."""
        if due is not None:
            self.gates.set_threshold(round(due * self.gates.n_weights))
            self.gates.threshold -= head_start(step, self.config.first_score, self.config.max_steps)
        self.gates.refresh(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * self.gates.rate(step)

    def attack(self, step: int, loss: Callable[[], Float[Tensor, ""]], ranks: Ranks) -> None:
        """Let the adversary, if there is one, climb the loss before a step; afterwards gradients are the scores'."""
        adversary = self.gates.adversary
        if adversary is None:
            return
        adversary.begin(self.seed * _SEEDS_APART + step)
        for _ in range(self.config.worst_case):
            loss().backward()
            for pull in adversary.pull.tensors:
                ranks.add_up(pull)
            adversary.climb()
        adversary.is_climbing = False

    def count_once(self, ranks: Ranks) -> None:
        """Keep the gradient that there is, that of the penalty, on the first rank alone: the sum then has it once."""
        if self.gates.scores.is_whole and not ranks.is_first:
            for gradient in self.gates.gradient.tensors:
                gradient.zero_()

    def descend(self, ranks: Ranks) -> None:
        """Change the scores by the optimizer's step along the sum of all ranks' gradients."""
        for gradient in self.gates.gradient.tensors:
            if self.gates.scores.is_whole:  # otherwise they were added up in the backward pass
                ranks.add_up(gradient)
        self.optimizer.step()

    def record(
        self, step: int, cross_entropy: float, penalty: float, undecided: int, due: float | None, weight: float | int
    ) -> StepRecord:
        """Build the record of a step."""
        gates, kept = self.gates, self.gates.n_kept()
        return StepRecord(
            attempt=self.start.attempt,
            step=step,
            cross_entropy=cross_entropy,
            fraction=(kept + self._candidates.total - gates.n_weights) / self._candidates.total,
            undecided=undecided / len(gates.scores),
            due=due,
            above_zero=(gates.n_above_zero() if due is not None else kept) / gates.n_weights,
            penalty=penalty,
            sparsity_weight=weight,
        )

    def may_stop(self, step: int, decided: int) -> bool:
        """Whether decided gates mean that learning is done.

        That is so if some are closed, the step saw whole sequences, and the share to reach is due.
        """
        return (
            decided < self._n_possible
            and step >= self.config.short_steps
            and (self.share is None or has_fallen(step, self.config.max_steps))
        )

    def is_finite(self) -> bool:
        """Whether no score is NaN, as scores become after a non-finite gradient."""
        return self.gates.is_finite

    def mask(self, within: Mask | None) -> Mask:
        """The weights and nodes whose hard gate is open, and those without a gate; no adversary opens others then."""
        self.gates.adversary = None
        return self._candidates.mask(self.gates, self.wanted, within, self._apart)

    # --- states ---

    @property
    def checkpoint_size(self) -> int:
        """Approximate checkpoint size in bytes."""
        return 12 * len(self.gates.scores) * (2 if self._good.tensors else 1)

    def pack(self, step: int) -> Checkpoint:
        """The state after `step` steps, including the last good state, so that later rollbacks are the same.

        If it is `sharded`, all processes have to pack, and the first one's is whole.
        """
        good = {f"good.{name}": tensor for name, tensor in self._good.tensors.items()}
        good_step = self._good.step if self._good.tensors else None
        tensors = self._joined(self._tensors() | good)
        return replace(self._good, tensors=tensors, step=step, seconds=self.seconds, good_step=good_step)

    def _tensors(self) -> dict[str, Tensor]:
        """A copy of the scores and the optimizer's state, on the CPU: of all parts, whose steps are the same."""
        scores = self.gates.scores
        named = {"scores": scores.copied()}
        for name, first in self.optimizer.state[scores.tensors[0]].items():
            each = [self.optimizer.state[one][name] for one in scores.tensors]
            named[f"{self._kind}.{name}"] = Parted(each).copied() if first.ndim else first.to("cpu", copy=True)
        return named

    def _joined(self, tensors: Mapping[str, Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
        """Tensors of this process, with those of the others if they are `sharded`."""
        join = self.gates.scores.joined
        return {name: join(t, everywhere=everywhere) if t.ndim else t for name, t in tensors.items()}

    def _unpack(self, state: Checkpoint) -> Checkpoint:
        """Restore a state; returns the last good state it contains."""
        good = {name.removeprefix("good."): t for name, t in state.tensors.items() if name.startswith("good.")}
        own = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("good.")}
        for tensors in filter(None, (own, good)):
            self._check_fits(tensors)
        if own:
            scores = self.gates.scores
            scores.copy_(own["scores"])
            moments = {name.removeprefix(f"{self._kind}."): t for name, t in own.items() if name != "scores"}
            for place, one in zip(scores.places, scores.tensors, strict=True):
                self.optimizer.state[one] = {
                    name: (t if name == "step" else t[place]).to(one.device, copy=True) for name, t in moments.items()
                }
        if state.step and state.step == state.good_step:
            good = own
        return replace(state, tensors=good, step=state.good_step or 0, good_step=None)

    def _check_fits(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless these are the scores and moments of these gates."""
        n_gates, dtype = len(self.gates.scores), self.gates.scores.tensors[0].dtype
        names = ["scores", *(f"{self._kind}.{name}" for name in self._moments)]
        wanted = {name: (torch.Size([n_gates]), dtype) for name in names}
        found = {name: (one.shape, one.dtype) for name, one in tensors.items() if name != "adam.step"}
        step = tensors.get("adam.step")
        if found != wanted or (self._kind == "adam") != (step is not None and step.numel() == 1):
            raise ValueError(
                f"the checkpoint does not hold the state of these {n_gates:,} gates: remove the folder "
                "'checkpoint' of the run to start over"
            )


def rate_after(config: SparsifyConfig, rollbacks: int) -> float:
    """The learning rate after this many rollbacks in an attempt: the recipe's, or else the method's, halved by each."""
    first = METHODS[config.method].learning_rate if config.learning_rate is None else config.learning_rate
    return first * 0.5**rollbacks
