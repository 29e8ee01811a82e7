"""Learn a subnetwork: one loop, in plain view.

The model is frozen; every maskable weight is multiplied by a soft gate (`gates.py`), and the gates' scores follow the
gradient of

    mean over positions of CE(target, softmax(logits))  +  sparsity_weight * mean over maskable weights of soft gate

while the gates harden. The loop stops as soon as few gates are undecided. A run whose cross-entropy jumps and does not
come back is tried again with another data order (Chang and Bergen 2025). A loss that is not finite, or explodes, sends
the run back to its last good state, with half the learning rate.

Every step is a function of the scores, the optimizer's moments, the step's number and the records of the steps before
it, and of where the run was sent back: a checkpoint holds just that, so a run that continues from it ends in the same
mask, bit for bit, as one that was never interrupted.
"""

from __future__ import annotations

import errno
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from bigram_circuits.evaluation import SoftHardGap, soft_hard_gap
from bigram_circuits.learning.memory import MemoryForecast, forecast
from bigram_circuits.masking.apply import gated
from bigram_circuits.masking.gates import Gates, tie_gates
from bigram_circuits.masking.methods.continuous_sparsification import ContinuousSparsification
from bigram_circuits.masking.methods.hard_concrete import HardConcrete
from bigram_circuits.masking.methods.straight_through import StraightThrough
from bigram_circuits.masking.units import UNITS
from bigram_circuits.measures import html
from bigram_circuits.measures.quantities import CROSS_ENTROPY, FRACTION, Quantity
from bigram_circuits.measures.results import Curves
from bigram_circuits.models.activations import lean_forward, recomputed
from bigram_circuits.models.weights import WeightSite, weight_hash, weight_sites
from bigram_circuits.runs import STOPS, Checkpoint, RunFolder
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import check_target, describe
from bigram_circuits.text.corpus import Corpus, batch_of

_GROWS = 1e5  # times, beta over the most steps
_LOW_DECAY = 0.99  # at most: a second moment in bfloat16 does not move by a thousandth of itself
_STEERED = 3.0  # times its first value, or a third of it: how far the penalty's weight goes for a share to reach
_GOOD_EVERY = 200  # steps between the states in memory that a loss that explodes sends the run back to
_MOST_ROLLBACKS = 4  # in an attempt
_EXPLODED = 10.0  # times the larger of the first step's CE and that of guessing among all tokens

_SCRATCH = {"continuous_sparsification": 0, "hard_concrete": 4, "straight_through": 16}  # bytes for each gate

METHODS = {"continuous_sparsification": 2e-2, "hard_concrete": 0.5, "straight_through": 1e-2}
"""The masking methods, and the learning rate of each if none is given."""


@dataclass(frozen=True)
class SparsifyConfig:
    """How to learn a subnetwork. The defaults are ours; `SparsifyConfig.paper()` is the published recipe."""

    method: str = "continuous_sparsification"
    """The masking method: `continuous_sparsification`, `hard_concrete` or `straight_through` (see `gates.py`)."""
    granularity: str | Mapping[str, str] = "weight"
    """What a gate governs: a single `weight`, an MLP `neuron`, an attention `head`, or a `block` (a whole attention or
    MLP). Or one for each component: `{"attn": "head", "mlp": "weight"}`. Components without one are kept whole."""
    layers: tuple[int, ...] | None = None
    """The layers to mask (None: all); the others are kept whole."""
    sparsity_weight: float | int = 10.0
    """Weight of the penalty, nats per unit of mean penalised gate: larger keeps fewer weights."""
    target_fraction: float | int | None = None
    """If given, this share of the maskable weights is kept: gates are open above a threshold that falls to just that
    share, and the penalty's weight (at first `sparsity_weight`) is steered so that the threshold comes to be 0. Exact
    for single weights; for larger units, the most units of highest score that do not exceed it. `straight_through`
    needs it."""
    learning_rate: float | int | None = None
    """AdamW's, for the scores; None: 2e-2, for straight-through 1e-2, for hard concrete 0.5."""
    weight_decay: float | int = 0.0
    """AdamW's, for the scores."""
    second_moment_decay: float | int = 0.99
    """AdamW's beta_2, for the scores: the mean of squared gradients is over about 1 / (1 - this) steps. With
    `low_memory` at most 0.99, since a second moment in bfloat16 does not move by less."""
    first_score: float | int = 0.0
    """Every score at the start; 0 is a soft gate of one half."""
    beta_start: float | int = 1.0
    """Continuous sparsification: beta at step 0; the soft gate is sigmoid(beta * score)."""
    beta_growth: float | int | None = None
    """Continuous sparsification: factor on beta at every step. None: such that beta would grow 100,000 times over
    `max_steps`, whatever their number; most gates are decided, and learning stops, about half way."""
    max_steps: int = 400
    """Steps after which to stop in any case."""
    batch_size: int = 16
    """Sequences in a step."""
    stop_undecided: float | int = 0.01
    """Stop when undecided gates (0.1 to 0.9) number less than this share of the decided-kept ones (above 0.9)."""
    recovery_steps: int = 20
    """A run whose CE jumped must have come back at least so many steps before its end."""
    retries: int = 3
    """How often to try again, with another data order, when a run was unstable."""
    low_memory: bool = False
    """Take less memory, at some cost in time: scores and moments are kept as bfloat16, and what a block computes is
    computed once more for the backward pass."""
    seed: int = 0
    """Orders the data; attempt k uses seed + k * 1,000,003."""

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        self._check_granularity()
        limits: dict[str, tuple[Callable[[Any], bool], str]] = {
            "sparsity_weight": (lambda v: 0 <= v < math.inf, "a number of at least 0"),
            "target_fraction": (lambda v: v is None or 0 < v <= 1, "above 0 and at most 1"),
            "learning_rate": (lambda v: v is None or 0 < v < math.inf, "above 0"),
            "weight_decay": (lambda v: 0 <= v < math.inf, "at least 0"),
            "first_score": (math.isfinite, "a finite number"),
            "beta_start": (lambda v: 0 < v < math.inf, "above 0"),
            "beta_growth": (lambda v: v is None or 1 <= v < 2, "from 1 to below 2"),
            "second_moment_decay": (lambda v: 0 < v < 1, "above 0 and below 1"),
            "max_steps": (lambda v: isinstance(v, int) and v >= 1, "a whole number of at least 1"),
            "batch_size": (lambda v: isinstance(v, int) and v >= 1, "a whole number of at least 1"),
            "stop_undecided": (lambda v: 0 <= v < 1, "from 0 to below 1"),
            "recovery_steps": (lambda v: isinstance(v, int) and v >= 1, "a whole number of at least 1"),
            "retries": (lambda v: isinstance(v, int) and v >= 0, "a whole number of at least 0"),
            "low_memory": (lambda v: isinstance(v, bool), "True or False"),
            "seed": (lambda v: isinstance(v, int) and v >= 0, "a whole number of at least 0"),
        }
        for name, (holds, wanted) in limits.items():
            if not holds(getattr(self, name)):
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)!r}")
        if self.method == "straight_through" and self.target_fraction is None:
            raise ValueError("straight_through keeps the highest scores: say how many with target_fraction")

    def _check_granularity(self) -> None:
        if isinstance(self.granularity, str):
            _check_choice("granularity", self.granularity, UNITS)
            return
        if not self.granularity:
            raise ValueError("granularity must name at least one component: attn or mlp")
        for component, unit in self.granularity.items():
            _check_choice("a component of granularity", component, ("attn", "mlp"))
            _check_choice(f"granularity of {component}", unit, [u for u, has in UNITS.items() if component in has])

    @property
    def unit_of(self) -> dict[str, str]:
        """What a gate governs, by component; components that are left out are kept whole."""
        if isinstance(self.granularity, str):
            return dict.fromkeys(UNITS[self.granularity], self.granularity)
        return dict(self.granularity)

    @classmethod
    def paper(cls, **changes: Any) -> SparsifyConfig:
        """The recipe of Chang and Bergen 2025, for sequences of 128 tokens; `changes` override fields."""
        published = cls(
            learning_rate=5e-5, weight_decay=0.01, second_moment_decay=0.999, first_score=0.0,
            beta_start=1.0, beta_growth=1.001,
            max_steps=15_000, batch_size=32, stop_undecided=0.01, recovery_steps=100, retries=3,
        )  # fmt: skip
        return replace(published, **changes)


def _check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


_LEARNED = (
    FRACTION,
    CROSS_ENTROPY,
    Quantity("undecided", "share", "Of the gates, those between 0.1 and 0.9."),
)


@dataclass(frozen=True)
class FoundSubnetwork:
    """What `find_subnetwork` returns."""

    subnetwork: Subnetwork
    """The weights whose hard gate is open."""
    history: list[dict[str, Any]] = field(repr=False)
    """One record a step: attempt, step, cross_entropy (nats), fraction (of maskable weights kept if it ended now), due
    (share of gated weights to be open, if there is a target), above_zero (share with a positive score), penalty (mean
    penalised gate), undecided (share of all gates), sparsity_weight."""
    config: SparsifyConfig
    """The settings it was found with."""
    stopped_because: str
    """`decided` (few gates were undecided), `max_steps`, and, after the last retry, `unstable`."""
    seconds: float
    """Time spent learning."""
    gap: SoftHardGap | None = None
    """Cross-entropy with the last soft gates, and with the mask made of them; None if an older run did not note it."""
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    """Each time the loss was not finite or exploded: attempt, step, what (in words), back_to (a step),
    and the learning_rate from there on. The abandoned steps are not in `history`."""

    def plot(self, quantity: str = "fraction") -> Any:
        """A plotly figure of a quantity of the history, step by step: `fraction`, `cross_entropy`, `undecided`."""
        values = np.array([[[record[one.name] for record in self.history]] for one in _LEARNED], dtype=float)
        steps = tuple(record["step"] for record in self.history)
        nothing = np.full_like(values, np.nan)
        return Curves("Learning", _LEARNED, "step", steps, ("subnetwork",), values, nothing, nothing).plot(quantity)

    def _repr_html_(self) -> str:
        """What a notebook shows: how it ended, and what was found."""
        last = self.history[-1]["cross_entropy"] if self.history else math.nan
        says = (
            f"Stopped after {len(self.history):,} steps: {STOPS[self.stopped_because]}. "
            f"Cross-entropy of the last step: {last:.3f} nats. Recipe: {self.config.method.replace('_', ' ')}, "
            f"sparsity weight {self.config.sparsity_weight:g}, seed {self.config.seed}."
        )
        return html.summary("A subnetwork was found", [says], self.subnetwork._repr_html_())


class _Exploded(Exception):  # noqa: N818 (no error as long as there is a state to go back to)
    """The loss is not finite, or exploded."""

    def __init__(self, what: str, step: int, good: Checkpoint, history: list[dict[str, Any]], seconds: float) -> None:
        super().__init__(f"{what} at step {step}")
        self.what, self.step, self.good, self.history, self.seconds = what, step, good, history, seconds


def find_subnetwork(
    model: Any,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    run_dir: Any = None,
    resume: bool = True,
    within: Subnetwork | None = None,
    rebuild: Mapping[str, Any] | None = None,
) -> FoundSubnetwork:
    """Learn which weights a model needs to reproduce a target, on `corpus.train`.

    Args:
        model: From `load_model`. Left bit-identical, also after an exception.
        target: An `NGramTable`, or any object with `cross_entropy` and `surprisal`.
        corpus: Its training part is learned from.
        config: The recipe; `SparsifyConfig()` if not given.
        run_dir: A folder to write the run to: settings, progress, checkpoints and the subnetwork.
        rebuild: How to make model, corpus and target again from names, noted in `run_dir` for the command line.
        within: Look only inside this subnetwork: weights outside it are dropped from the start.
        resume: Continue the run in `run_dir` from its checkpoint if it has the same settings; False starts over.

    Raises:
        ValueError: If target and model do not agree, `run_dir` holds a run with other settings, or the loss is not
            finite and stays so with lower learning rates.
        MemoryError: If learning would not fit the device (`forecast_memory`), or the device runs out of memory; the
            message says what to change.
        OSError: If another process is writing `run_dir` (the message says which), or it cannot be written, as when the
            disk is full. What was written is whole, and the run can go on from it.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after writing a checkpoint where there is a `run_dir`.
    """
    config = config or SparsifyConfig()
    check_target(target, model.cfg.d_vocab)
    if len(corpus.train) == 0:
        raise ValueError("the training part of the corpus is empty")
    if run_dir is None:
        return _learn(model, target, corpus, config, within, None)
    settings = run_settings(model, target, corpus, config, within)
    folder = RunFolder.open(run_dir, settings, resume=resume, rebuild=rebuild)
    if folder.is_finished:
        return _read_found(folder, model, config)
    with folder.lock():
        if folder.is_finished:  # by another process, just now
            return _read_found(folder, model, config)
        return _learn(model, target, corpus, config, within, folder)


def _learn(
    model: Any, target: Any, corpus: Corpus, config: SparsifyConfig, within: Subnetwork | None, folder: RunFolder | None
) -> FoundSubnetwork:
    """Attempt after attempt, each from its start or where it was interrupted, until one is stable."""
    forecast_memory(model, target, corpus, config, within=within).check()
    start, history = _take_up(folder)
    earlier: list[Mapping[str, Any]] = []  # rollbacks of attempts before
    with _interrupt_after_step() as interrupt, _says_what_to_change(folder):
        while True:
            try:
                found = _attempt(model, target, corpus, config, within, start, history, folder, interrupt)
            except _Exploded as trouble:
                start, history = _roll_back(trouble, start, config, folder), trouble.history[: trouble.good.step]
                continue
            if found.stopped_because != "unstable" or start.attempt >= config.retries:
                break
            earlier += start.rollbacks
            start, history = Checkpoint({}, 0, start.attempt + 1, 0.0), []
        found = replace(found, rollbacks=(*earlier, *start.rollbacks))
        if folder:
            outcome = {
                "stopped_because": found.stopped_because,
                "seconds": found.seconds,
                "attempts": start.attempt + 1,
                "soft_hard": None if found.gap is None else asdict(found.gap),
                "rollbacks": list(found.rollbacks),
            }
            folder.finish(found.subnetwork, outcome)
        if interrupt.is_set():
            kept = f"is kept in {str(folder.path)!r}, and the same command goes on" if folder else "is not kept"
            raise KeyboardInterrupt(f"interrupted when learning was done; the subnetwork {kept}")
    return found


def _take_up(folder: RunFolder | None) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """The state to start from, and the records of the steps before it in its attempt."""
    checkpoint, records = folder.take_up() if folder else (None, [])
    checkpoint = checkpoint or Checkpoint({}, 0, 0, 0.0)
    history = [record for record in records if record["attempt"] == checkpoint.attempt]
    assert len(history) == checkpoint.step, f"{len(history)} records before step {checkpoint.step}"
    return checkpoint, history


def forecast_memory(
    model: Any, target: Any, corpus: Corpus, config: SparsifyConfig | None = None, *, within: Subnetwork | None = None
) -> MemoryForecast:
    """How much memory `find_subnetwork` would take at its peak, from two forward passes over a sequence or two.

    Args: as for `find_subnetwork`, which asks this first and refuses what would not fit.

    Raises:
        ValueError: If model, target and recipe do not fit together.
    """
    config = config or SparsifyConfig()
    check_target(target, model.cfg.d_vocab)
    sites = weight_sites(model)
    ties = tie_gates(sites, config.unit_of, config.layers)
    return forecast(
        model, target, corpus.train, ties, lambda: make_gates(sites, config, config.seed, within)[0],
        config.batch_size, config.low_memory, _SCRATCH[config.method],
    )  # fmt: skip


def run_settings(
    model: Any, target: Any, corpus: Corpus, config: SparsifyConfig, within: Subnetwork | None = None
) -> dict[str, Any]:
    """What decides a run's result, as JSON values; a run's folder is tied to it."""
    return {
        "model": {
            "name": model.cfg.model_name,
            "revision": getattr(model.cfg, "revision", None),
            "weight_hash": weight_hash(model),
            "dtype": str(model.cfg.dtype),
        },
        "corpus": {
            "source": corpus.source,
            "fingerprint": corpus.fingerprint,
            "tokenizer_hash": corpus.tokenizer_hash,
            "context_length": corpus.context_length,
        },
        "target": describe(target),
        "recipe": asdict(config),
        "within": within.checksum if within else None,
    }


def is_unstable(cross_entropies: Sequence[float], recovery_steps: int) -> bool:
    """Whether a run's CE jumped and did not come back in time (Chang and Bergen 2025).

    A jump is a step whose CE exceeds the mean of the 10 before it by more than 0.25 nats or 25%. It came back at a
    later step that does not exceed that mean so, at least `recovery_steps` before the end. Where the CE is so small
    that batches differ by more than 25%, as on a task that is solved, four standard deviations of those 10 count
    instead of the 25%.
    """
    values = np.asarray(cross_entropies)
    for step in range(10, len(values)):
        before, noise = values[step - 10 : step].mean(), values[step - 10 : step].std(ddof=1)
        limit = before + min(0.25, max(0.25 * before, 4 * noise))
        if values[step] > limit and not (values[step + 1 : len(values) - recovery_steps] <= limit).any():
            return True
    return False


def share_due(step: int, share: float, max_steps: int) -> float:
    """With a share to reach: the share open at a step, from one half down in equal factors over 30% of the steps."""
    return 0.5 * (share / 0.5) ** min(1.0, step / (0.3 * max_steps)) if share < 0.5 else share


def next_sparsity_weight(history: Sequence[Mapping[str, Any]], first: float | int) -> float | int:
    """The penalty's weight for the step after `history`: `first`, or, with a share to reach, steered towards it.

    Gates are open above a threshold that keeps just the share that is due. The weight follows until it is 0: it is
    multiplied by (share of scores above 0 / share due) to the power 0.1, by 0.9 to 1.1 at most, and stays between a
    third of `first` and three times that: beyond, it would decide what is kept, and not the loss.
    """
    if not history or history[-1]["due"] is None:
        return first
    last = history[-1]
    change = (max(last["above_zero"], 0.1 * last["due"]) / last["due"]) ** 0.1
    return min(max(last["sparsity_weight"] * min(max(change, 0.9), 1.1), first / _STEERED), first * _STEERED)


def make_gates(
    sites: Sequence[WeightSite], config: SparsifyConfig, seed: int, within: Subnetwork | None
) -> tuple[Gates, int | None]:
    """The gates of a recipe, and how many gated weights to keep in the end (None: as many as turn out)."""
    ties = tie_gates(sites, config.unit_of, config.layers)
    total, gated_weights = (sum(site.size for site in some) for some in (sites, [tie.site for tie in ties]))
    wanted = None
    if config.target_fraction is not None:
        wanted = round(config.target_fraction * total) - (total - gated_weights)
        if wanted < 0:
            raise ValueError(
                f"target_fraction is {config.target_fraction}, but the weights that are not masked are already "
                f"{(total - gated_weights) / total:.4g} of all"
            )
    stored = {site.name: site.to_stored(within[site.name]) for site in sites} if within else None
    dtype = torch.bfloat16 if config.low_memory else torch.float32
    start: dict[str, Any] = {"first_score": float(config.first_score), "within": stored, "dtype": dtype}
    if config.method == "hard_concrete":
        return HardConcrete(ties, seed=seed, **start), wanted
    if config.method == "straight_through":
        assert wanted is not None, "the config was checked"
        return StraightThrough(ties, target=wanted, steps=config.max_steps, **start), wanted
    growth = _GROWS ** (1 / config.max_steps) if config.beta_growth is None else config.beta_growth
    beta = {"beta_start": float(config.beta_start), "beta_growth": float(growth)}
    return ContinuousSparsification(ties, **beta, **start), wanted


def _attempt(
    model: Any, target: Any, corpus: Corpus, config: SparsifyConfig, within: Subnetwork | None, start: Checkpoint,
    history: list[dict[str, Any]], folder: RunFolder | None, interrupt: threading.Event,
) -> FoundSubnetwork:  # fmt: skip
    """Learn once, from a state and the records of the steps before it."""
    sites = weight_sites(model)
    total = sum(site.size for site in sites)
    attempt = start.attempt
    seed = config.seed + 1_000_003 * attempt
    gates, wanted = make_gates(sites, config, seed, within)
    share = None if wanted is None else max(wanted, 1) / gates.n_weights
    rate = _learning_rate(config, len(start.rollbacks))
    decay = min(config.second_moment_decay, _LOW_DECAY) if config.low_memory else config.second_moment_decay
    optimizer = torch.optim.AdamW(
        [gates.scores], lr=rate, weight_decay=config.weight_decay, betas=(0.9, decay), fused=True
    )
    good = _restore(start, gates, optimizer)
    started = time.monotonic() - start.seconds
    stopped_because = "max_steps"
    description = "learning" if attempt == 0 else f"learning, attempt {attempt + 1}"
    bar = tqdm(desc=description, initial=start.step, total=config.max_steps, unit="step", delay=2, leave=False)
    with gated(model, gates), lean_forward(model), recomputed(model) if config.low_memory else nullcontext(), bar:
        for step in range(start.step, config.max_steps):
            if step and step % _GOOD_EVERY == 0:
                good = replace(start, tensors=_tensors(gates, optimizer), step=step, seconds=time.monotonic() - started)
            tokens = batch_of(corpus.train, config.batch_size, step=step, seed=seed)
            tokens = tokens.to(gates.scores.device)
            sparsity_weight = next_sparsity_weight(history, config.sparsity_weight)

            due = None if share is None else share_due(step, share, config.max_steps)
            if due is not None:
                gates.aim(round(due * gates.n_weights))
            gates.refresh(step)
            penalty, between, above = gates.penalise(sparsity_weight)
            cross_entropy = target.cross_entropy(model(tokens), tokens).mean()
            cross_entropy.backward()  # adds to the gradient of the penalty
            optimizer.step()

            n_kept = gates.n_kept()
            record = {
                "attempt": attempt,
                "step": step,
                "cross_entropy": cross_entropy.item(),
                "fraction": (n_kept + total - gates.n_weights) / total,
                "due": due,
                "above_zero": (gates.n_above_zero() if due is not None else n_kept) / gates.n_weights,
                "penalty": penalty,
                "undecided": between / gates.scores.numel(),
                "sparsity_weight": sparsity_weight,
            }
            what = _explosion(record, history, gates, model.cfg.d_vocab)
            if what:
                raise _Exploded(what, step, good, history, time.monotonic() - started)
            history.append(record)
            bar.set_postfix_str(
                f"CE {record['cross_entropy']:.3f}, kept {100 * record['fraction']:.2f}%, "
                f"undecided {100 * record['undecided']:.2f}%",
                refresh=False,
            )
            bar.update()
            if folder:
                folder.log(record)
            if between < config.stop_undecided * above:
                stopped_because = "decided"
                break
            if folder and (interrupt.is_set() or folder.checkpoint_is_due(_size(gates, good))):
                folder.write_checkpoint(_checkpoint(gates, optimizer, good, step + 1, time.monotonic() - started))
            if interrupt.is_set():
                kept = (
                    f"its state is kept in {str(folder.path)!r}, and the same command continues it"
                    if folder
                    else "nothing is kept"
                )
                raise KeyboardInterrupt(f"interrupted after step {step + 1} of at most {config.max_steps}; {kept}")
    if is_unstable([record["cross_entropy"] for record in history], config.recovery_steps):
        stopped_because = "unstable"
    masks = gates.masks(wanted)
    whole = {site.name: torch.ones(site.shape, dtype=torch.bool) for site in sites if site.name not in masks}
    subnetwork = Subnetwork(
        {site.name: whole[site.name] if site.name in whole else site.from_stored(masks[site.name]) for site in sites},
        model_name=model.cfg.model_name,
        weight_hash=weight_hash(model),
        lineage="found" if within is None else f"found within ({within.lineage})",
    )
    last = len(history) - 1
    tokens = batch_of(corpus.train, config.batch_size, step=last, seed=seed).to(gates.scores.device)
    gap = soft_hard_gap(model, gates, subnetwork, target, tokens, last)
    return FoundSubnetwork(subnetwork, history, config, stopped_because, time.monotonic() - started, gap)


# --- states: to continue from, to go back to -------------------------------------------------------------------------


def _tensors(gates: Gates, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of the scores and the optimizer's moments, in the CPU's memory."""
    named = {"scores": gates.scores, **{f"adam.{name}": value for name, value in optimizer.state[gates.scores].items()}}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}


def _size(gates: Gates, good: Checkpoint) -> int:
    """Bytes of a checkpoint, nearly."""
    return 12 * gates.scores.numel() * (2 if good.tensors else 1)


def _checkpoint(
    gates: Gates, optimizer: torch.optim.Optimizer, good: Checkpoint, step: int, seconds: float
) -> Checkpoint:
    """The state after `step` steps, and with it the last good one: without that, going back would lead elsewhere."""
    tensors = _tensors(gates, optimizer) | {f"good.{name}": tensor for name, tensor in good.tensors.items()}
    good_step = good.step if good.tensors else None
    return replace(good, tensors=tensors, step=step, seconds=seconds, good_step=good_step)


def _restore(state: Checkpoint, gates: Gates, optimizer: torch.optim.Optimizer) -> Checkpoint:
    """Put a state into gates and optimizer; returns the last good state known then."""
    good = {name.removeprefix("good."): t for name, t in state.tensors.items() if name.startswith("good.")}
    own = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("good.")}
    if own:
        with torch.no_grad():
            gates.scores.copy_(own["scores"])
        moments = {name.removeprefix("adam."): t for name, t in own.items() if name.startswith("adam.")}
        device = gates.scores.device
        optimizer.state[gates.scores] = {name: tensor.to(device, copy=True) for name, tensor in moments.items()}
    if state.step and state.step == state.good_step:
        good = own
    return replace(state, tensors=good, step=state.good_step or 0, good_step=None)


def _learning_rate(config: SparsifyConfig, rollbacks: int) -> float:
    """The optimizer's, after so many rollbacks in the attempt."""
    rate = METHODS[config.method] if config.learning_rate is None else config.learning_rate
    return rate * 0.5**rollbacks


def _explosion(
    record: Mapping[str, Any], history: Sequence[Mapping[str, Any]], gates: Gates, d_vocab: int
) -> str | None:
    """In words, a loss or gradient that is not finite, or a CE far above both the first step's and that of guessing."""
    loss = record["cross_entropy"] + record["sparsity_weight"] * record["penalty"]
    first = history[0]["cross_entropy"] if history else math.inf
    if not math.isfinite(loss) or record["cross_entropy"] > _EXPLODED * max(first, math.log(d_vocab)):
        return f"the loss is {loss:.4g}"
    return "the gradient is not finite" if gates.scores.detach().sum().isnan() else None


def _roll_back(trouble: _Exploded, start: Checkpoint, config: SparsifyConfig, folder: RunFolder | None) -> Checkpoint:
    """The state to go on from when the loss exploded: the last good one, or the attempt's start if it came from there.

    Raises:
        ValueError: If no lower rate can help, or enough were tried.
    """
    what, before = str(trouble), start.rollbacks
    if trouble.step == 0:
        raise ValueError(
            f"{what}: the model's logits or gradients are not finite before anything was learned; try float32 "
            "(--dtype float32)"
        ) from None
    if len(before) >= _MOST_ROLLBACKS:
        raise ValueError(
            f"{what}, and exploded or was not finite at learning rates from {_learning_rate(config, 0):g} down to "
            f"{_learning_rate(config, len(before)):g}: try float32 (--dtype float32), a much lower learning rate "
            "(--learning-rate), or another --seed"
        ) from None
    good = trouble.good
    if before and good.step <= before[-1]["back_to"]:
        good = trouble.good = Checkpoint({}, 0, good.attempt, 0.0)
    rate = _learning_rate(config, len(before) + 1)
    rollback = {"attempt": good.attempt, "step": trouble.step, "what": trouble.what, "back_to": good.step}
    tqdm.write(f"{what}: back to step {good.step}, with learning rate {rate:g}", file=sys.stderr)
    rollbacks = (*before, rollback | {"learning_rate": rate})
    state = replace(good, seconds=trouble.seconds, rollbacks=rollbacks, good_step=good.step or None)
    if folder:
        earlier = [record for record in folder.history() if record["attempt"] < good.attempt]
        folder.rewind(state, earlier + trouble.history[: good.step])
    return state


# --- memory ----------------------------------------------------------------------------------------------------------

LESS_MEMORY = "use --low-memory, a smaller --batch-size, a shorter --context-length, --dtype bfloat16, or --device cpu"
"""What to change when memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device is used up."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "unable to allocate")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


@contextmanager
def _says_what_to_change(folder: RunFolder | None) -> Iterator[None]:
    """Within the block, an error that says that memory or disk is full also says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        kept = f"; what {str(folder.path)!r} holds is whole, and the same command continues it" if folder else ""
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MemoryError(f"out of memory while learning: {LESS_MEMORY}{kept} ({reason})") from error
    except OSError as error:
        if folder is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno, f"{error.strerror}; free some space, and the same command continues the run"
        ) from error


def _read_found(folder: RunFolder, model: Any, config: SparsifyConfig) -> FoundSubnetwork:
    """A run that was finished before."""
    outcome = folder.outcome()
    return FoundSubnetwork(
        subnetwork=Subnetwork.load(folder.path / "subnetwork.safetensors", model),
        history=[record for record in folder.history() if record["attempt"] == outcome["attempts"] - 1],
        config=config,
        stopped_because=outcome["stopped_because"],
        seconds=outcome["seconds"],
        gap=SoftHardGap(**outcome["soft_hard"]) if outcome.get("soft_hard") else None,
        rollbacks=tuple(outcome.get("rollbacks", ())),
    )


@contextmanager
def _interrupt_after_step() -> Iterator[threading.Event]:
    """Within the block, a first Ctrl-C or SIGTERM only sets the event, so that a step is never cut in two.

    A second one raises at once.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def request(*_: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
