"""Learn a subnetwork: one loop, in plain view (`_attempt`).

The model is frozen; every maskable weight is multiplied by a soft gate (`masking/gates.py`), and the gates' scores are
trained by gradient descent on

    mean over positions of CE(target, softmax(logits))  +  sparsity_weight * mean over maskable weights of soft gate

(and, apart from other masks, overlap_weight * mean of soft gate times the number of masks that keep the weight) while
the gates harden. The loop stops as soon as few gates are undecided. A run whose cross-entropy jumps and does not
recover is retried with another data order (Chang and Bergen 2025). If the loss explodes or is not finite, the run is
rolled back to its last good state and continues with half the learning rate.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.circuit import EDGE, Circuit
from bigram_circuits.evaluation import SoftHardGap, soft_hard_gap
from bigram_circuits.learning.callbacks import Callback, check_callbacks, tell_end, tell_step
from bigram_circuits.learning.found import Found, FoundCircuit, FoundSubnetwork, kind_of_found
from bigram_circuits.learning.learner import Learner, rate_after
from bigram_circuits.learning.memory import forecast_memory, is_out_of_memory, less_memory
from bigram_circuits.learning.names import names_of
from bigram_circuits.learning.polish import polish_on
from bigram_circuits.learning.ranks import Ranks, current_ranks
from bigram_circuits.learning.schedules import explosion, is_unstable, next_sparsity_weight, share_due
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask, replaced
from bigram_circuits.masking.candidates import OVERLAP_WEIGHT, Apart, Candidates
from bigram_circuits.masking.replacing import pairs_of
from bigram_circuits.models.activations import check_tokens, lean_forward, n_outputs, recomputed
from bigram_circuits.models.identity import check_is, weight_hash
from bigram_circuits.models.logits import mean_cross_entropy
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.progress import note, progress
from bigram_circuits.recipe import Inputs, SparsifyConfig, for_nodes
from bigram_circuits.runs import (
    Checkpoint,
    CorpusIdentity,
    ModelIdentity,
    Rollback,
    RunFolder,
    RunSettings,
    StepRecord,
    TargetIdentity,
)
from bigram_circuits.runs.contents import how_runs_differ
from bigram_circuits.storage.terminal import signals_handled
from bigram_circuits.subnetwork import SubnetworkLike, as_subnetwork
from bigram_circuits.targets.base import PlacedTarget, Target, target_of
from bigram_circuits.tasks.target import TaskTarget
from bigram_circuits.tasks.task import Task, ability, refuse_unable
from bigram_circuits.text.corpus import Corpus, batch_of, spread

__all__ = ["FoundSubnetwork", "SparsifyConfig", "find_circuit", "find_subnetwork", "forecast_memory", "run_settings"]

_MOST_ROLLBACKS = 4  # per attempt
_AVERAGED = 1 << 17  # tokens of the training part that means are over, at most
_POLISHED_ON, _MOST_MEASURED = 4, 2000  # batches of text on which a mask is polished, and masks measured


@dataclass(frozen=True)
class _Job:
    """Everything that learning needs: inputs, recipe, run folder and observers."""

    model: Model
    target: Target
    corpus: Corpus
    config: SparsifyConfig
    candidates: Candidates
    within: Mask | None
    apart: Apart | None
    folder: RunFolder | None
    callbacks: Sequence[Callback]
    interrupt: threading.Event
    ranks: Ranks
    sharded: bool

    @property
    def is_sharded(self) -> bool:
        """Whether processes divide weights, scores and moments, and not the batch alone."""
        return self.sharded and self.ranks.size > 1

    @property
    def written(self) -> RunFolder | None:
        """The run's folder, if this process is the one that writes it."""
        return self.folder if self.ranks.is_first else None


class _Exploded(Exception):  # noqa: N818 (no error as long as there is a state to roll back to)
    """The loss exploded or is not finite."""

    def __init__(self, what: str, step: int, good: Checkpoint, seconds: float) -> None:
        super().__init__(f"{what} at step {step}")
        self.what, self.step, self.good, self.seconds = what, step, good, seconds


@uses_model
def find_subnetwork(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    within: SubnetworkLike | None = None,
    apart_from: Sequence[SubnetworkLike] = (),
    overlap_weight: float | int = OVERLAP_WEIGHT,
    rebuild: Inputs | None = None,
    callbacks: Sequence[Any] = (),
    check_memory: str = "warn",
    sharded: bool = False,
) -> FoundSubnetwork:
    """Learn which weights a model needs to reproduce a target, on `corpus.train`.

    In a process group of `torch.distributed`, or started by `torchrun`, all processes learn together, each on its
    sequences of every batch (`batch_size` counts those of all), and return the same; the first writes and calls back.

    Args:
        model: From `load_model`. Left bit-identical, even after an exception.
        target: An `NGramTable`, or any object with `cross_entropy` and `surprisal`.
        corpus: Masks are learned on its training part.
        config: The recipe; `SparsifyConfig()` by default.
        run_dir: A folder to write the run to: settings, progress, checkpoints and the subnetwork.
        resume: Continue the run in `run_dir` from its checkpoint if it has the same settings; False starts over.
        within: Search only inside this subnetwork: weights outside it are dropped from the start.
        apart_from: Other subnetworks that this one should share as little with as it can.
        overlap_weight: What sharing costs, in nats: `overlap_weight` times the mean over weights of soft gate times
            the number of those subnetworks that keep the weight is added to the loss. `math.inf`: no gate may open
            that governs a weight that one of them keeps.
        rebuild: Names of model, text and target, recorded in `run_dir` for the command line; by default those that
            `load_model` and `load_corpus` were given, if all three have one.
        callbacks: Objects with `on_step(record)` and `on_end(found)`, called after every step and at the end. For a run
            that is resumed or already finished, only steps done in this call are reported.
        check_memory: What to do if the memory forecast does not fit: `"warn"`, `"strict"` (raise) or `"off"` (make no
            forecast); see `MemoryForecast.check`.
        sharded: If several processes learn together (`torchrun`), each keeps only its share of the blocks' weights, of
            the scores and of the optimizer's state, so that memory per process falls with their number; no forecast is
            made then. The result is that of learning without it, up to the order of floating-point sums.

    Raises:
        ValueError: If target and model do not fit together, `run_dir` holds a run with other settings, or the loss
            explodes or is not finite even at lower learning rates; or if the recipe asks for nodes (`find_circuit`), or
            to polish what is learned apart from others; or processes that learn together are given different runs, or
            fewer sequences than there are processes.
        MemoryError: If learning cannot fit the device (`forecast_memory`), or the device runs out of memory; the
            message says what to change.
        OSError: If another process is writing to `run_dir` (the message says which), or it cannot be written, for
            example because the disk is full. The files already written are intact, and the run can be resumed.
            Of several processes: that another one has ended (`ConnectionError`).
        KeyboardInterrupt: On Ctrl-C, SIGTERM or SIGHUP, in any of several processes, after writing a checkpoint if
            there is a `run_dir`.

    Example:
        >>> recipe = bc.SparsifyConfig(target_fraction=0.01, max_steps=2)  # too few steps to find anything
        >>> found = bc.find_subnetwork(model, target, corpus, recipe)
        >>> print(f"{found.subnetwork.fraction:.2f}")
        0.01
    """
    config = config or SparsifyConfig()
    if config.units is not None:
        raise ValueError(f"the recipe asks for nodes, units {', '.join(config.units)}: use find_circuit")
    within = None if within is None else as_subnetwork(within)
    apart = _apart(apart_from, overlap_weight, config)
    found = _find(
        model, target, corpus, config, run_dir, resume, within, apart, rebuild, callbacks, check_memory, sharded
    )
    assert isinstance(found, FoundSubnetwork), "nodes were not asked for"
    return found


@uses_model
def find_circuit(
    model: Model,
    task: Any,
    corpus: Corpus | None = None,
    config: SparsifyConfig | None = None,
    *,
    units: str | Sequence[str] | None = None,
    replace: str | None = None,
    target_fraction: float | None = None,
    edges: bool = False,
    measure: str = "loss",
    force: bool = False,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    within: MaskLike | None = None,
    apart_from: Sequence[MaskLike] = (),
    overlap_weight: float | int = OVERLAP_WEIGHT,
    rebuild: Inputs | None = None,
    callbacks: Sequence[Any] = (),
    check_memory: str = "warn",
) -> FoundCircuit:
    """Learn which nodes a model needs for a behaviour: the same loop and methods as for weights, through hooks.

    The values of dropped nodes are replaced; those of other units are computed as always.

    Args:
        model: From `load_model`. Left bit-identical, even after an exception.
        task: A `Task` (from `load_task`, for example), a `TaskTarget`, or any other target, which then needs a corpus.
        corpus: The circuit is learned on its training part. By default that of the task, 70% of its rows; hold out
            others with `task.corpus(held_out=...)`.
        config: The recipe, which the next three arguments change. By default ours for nodes (`for_nodes`): with a
            `target_fraction` straight-through, scored along the path from closed to open gates; else continuous
            sparsification with hard gates from half of the steps.
        units: What has a gate: `head`, `neuron`, `attn`, `mlp`, `edge` (what each part writes into what each other
            part reads: `edge_sites`), or names of hook points, one or several; and `weight` for single weights, of the
            components in `config.granularity`. By default the recipe's, or heads and neurons.
        replace: What takes the place of a dropped node: `zero`, `mean`, `mean_by_position` (over the training part),
            `resample` (another sequence of the batch) or `counterfactual` (the paired prompt of the task); see
            `Replacement`. By default the recipe's: of ours zero, or the mean if edges have gates.
        target_fraction: Keep exactly this share of the nodes.
        edges: The same as `units="edge"`.
        measure: What is asked for at the answers of a `Task`, one of `MEASURES`; see `TaskTarget`.
        force: Go on although the full model is not shown to do the task better than guessing.
        run_dir: As for `find_subnetwork`; the circuit is in `circuit.safetensors`.
        resume: As for `find_subnetwork`.
        within: Search only inside this circuit, which has the same units.
        apart_from: Other circuits, with the same units, that this one should share as little with as it can.
        overlap_weight: As for `find_subnetwork`.
        rebuild: As for `find_subnetwork`.
        callbacks: As for `find_subnetwork`.
        check_memory: As for `find_subnetwork`.

    Raises:
        ValueError: As `find_subnetwork`; and if the model lacks a unit, the replacement is unknown or lacks its text,
            or the full model is not shown to do the task; or several processes are to `resample`.
        MemoryError: As `find_subnetwork`.
        OSError: As `find_subnetwork`.
        KeyboardInterrupt: As `find_subnetwork`.

    Example:
        >>> heads = bc.find_circuit(model, target, corpus, config, units="head", target_fraction=0.5)
        >>> print(heads.circuit.fraction)
        0.5
    """
    if edges and units not in (None, EDGE):
        raise ValueError(f"edges=True asks for edges alone: give units={[*as_units(units), EDGE]} for both")
    units = EDGE if edges else units
    target, corpus, config = as_behaviour(model, task, corpus, config, units, replace, target_fraction, measure)
    bounds = None if within is None else as_mask(within)
    if isinstance(target, TaskTarget) and not force:
        refuse_unable(ability(model, target.task), "force=True")
    apart = _apart(apart_from, overlap_weight, config)
    found = _find(
        model, target, corpus, config, run_dir, resume, bounds, apart, rebuild, callbacks, check_memory, sharded=False
    )
    assert isinstance(found, FoundCircuit), "nodes were asked for"
    return found


def as_units(units: str | Sequence[str] | None) -> tuple[str, ...]:
    """One unit, or several, as a recipe has them."""
    return (units,) if isinstance(units, str) else tuple(units or ())


def as_behaviour(
    model: Model,
    task: Any,
    corpus: Corpus | None,
    config: SparsifyConfig | None,
    units: str | Sequence[str] | None,
    replace: str | None,
    target_fraction: float | None,
    measure: str,
) -> tuple[Target, Corpus, SparsifyConfig]:
    """The target, text and recipe that the arguments of `find_circuit` mean.

    Raises:
        ValueError: As `find_circuit`.
    """
    asked = as_units(units) or ("head", "neuron")
    config = config or SparsifyConfig(**for_nodes(target_fraction, asked), target_fraction=target_fraction, units=asked)
    changes: dict[str, Any] = {
        "units": config.units or asked,
        "replace": replace or config.replace,
        "target_fraction": config.target_fraction if target_fraction is None else target_fraction,
    }
    if units is not None:
        changes["units"] = as_units(units)
    config = dataclasses.replace(config, **changes)
    if isinstance(task, Task):
        task = TaskTarget(task, measure, model=model)
    target = target_of(task, model)
    if corpus is None:
        if not isinstance(target, TaskTarget):
            raise ValueError("a target that is no task needs a corpus to learn on")
        corpus = target.task.corpus()
    return target, corpus, config


def find_mask(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig,
    **options: Any,
) -> FoundSubnetwork | FoundCircuit:
    """`find_circuit` if the recipe asks for nodes, else `find_subnetwork`; the model was shown to do a task."""
    if config.units is None:
        return find_subnetwork(model, target, corpus, config, **options)
    if options.pop("sharded", False):
        raise ValueError(f"sharded learning is of single weights, but the recipe asks for {', '.join(config.units)}")
    return find_circuit(model, target, corpus, config, force=True, **options)


def _apart(masks: Sequence[MaskLike], overlap_weight: float | int, config: SparsifyConfig) -> Apart | None:
    """What a mask is learned apart from; None: from nothing.

    Raises:
        ValueError: If the weight is below 0, or the recipe polishes.
    """
    if not overlap_weight >= 0:
        raise ValueError(f"overlap_weight must be a number of at least 0, or math.inf, not {overlap_weight!r}")
    if not masks:
        return None
    if config.polish:
        raise ValueError("polishing would share weights again: leave polish out of a recipe with apart_from")
    return Apart(tuple(as_mask(one) for one in masks), float(overlap_weight))


def _find(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig,
    run_dir: str | os.PathLike[str] | None,
    resume: bool,
    within: Mask | None,
    apart: Apart | None,
    rebuild: Inputs | None,
    callbacks: Sequence[Any],
    check_memory: str,
    sharded: bool,
) -> Found:
    """`find_subnetwork` or `find_circuit`, as the recipe says."""
    target, others = target_of(target, model), apart.masks if apart else ()
    check_callbacks(callbacks)
    if len(corpus.train) == 0:
        raise ValueError("the training part of the corpus is empty")
    check_tokens(model, corpus.train)
    _with_short_steps(model, target, config)
    ranks = current_ranks()
    if sharded and set(config.unit_of.values()) != {"weight"}:
        raise ValueError(
            f"sharded learning is of single weights: leave sharded out, or granularity {config.granularity!r}"
        )
    if ranks.size > 1:
        run_dir = ranks.first_does(lambda: run_dir)
        _check_same(ranks, run_settings(model, target, corpus, config, within, apart), corpus, config)
    folder = None if run_dir is None else RunFolder(Path(run_dir))

    def read() -> Found | None:
        """The result, if it was found before."""
        return folder and _read_found(folder, model, target, config)

    def opened() -> Found | None:
        """Open the folder."""
        if folder is not None:
            settings, names = (
                run_settings(model, target, corpus, config, within, apart),
                names_of(model, target, corpus),
            )
            RunFolder.open(folder.path, settings, resume=resume, rebuild=rebuild or names)
        return read()

    found = ranks.first_does(opened)
    if found is not None:
        return found
    with _locked(folder, ranks):
        found = ranks.first_does(read)  # again: another process may have just finished it
        if found is not None:
            return found
        candidates = make_candidates(model, target, corpus, config)
        if within is not None:
            candidates.check_covers(within, "within")
        for one in others:
            candidates.check_covers(one, "each mask of apart_from")
        forecast_memory(
            model, target, corpus, replace(config, batch_size=-(-config.batch_size // ranks.size)),
            within=within, apart_from=others, candidates=candidates,
            mode=check_memory if ranks.is_first and not sharded else "off",  # it forecasts what is not sharded
        )  # fmt: skip
        with _interrupt_after_step(again=ranks.size == 1) as interrupt, _says_what_to_change(folder):
            job = _Job(
                model, target, corpus, config, candidates, within, apart, folder, callbacks, interrupt, ranks, sharded
            )
            return _learn(job)


def _with_short_steps(model: Model, target: Target, config: SparsifyConfig) -> SparsifyConfig:
    """The recipe with its share of short steps as a number.

    Raises:
        ValueError: If short steps are asked for that may not reach what the target is defined at.
    """
    config = config.with_short_steps(target.context_length, str(model.cfg.positional_embedding_type))
    if config.short_steps:
        if isinstance(target, PlacedTarget):
            raise ValueError("short_until: short steps may not see the answers of a task; leave it out")
        if not range(*target.positions.indices(config.short_length)):
            raise ValueError(
                f"short_until: the target is defined at none of the first short_length={config.short_length} tokens"
            )
    return config


def _check_same(ranks: Ranks, settings: RunSettings, corpus: Corpus, config: SparsifyConfig) -> None:
    """Raise ValueError, on all ranks, unless they learn the same, and it can be divided among them."""
    for rank, other in enumerate(told := ranks.gather(settings)):
        how = how_runs_differ(told[0], other)
        if how is not None:
            raise ValueError(f"process {rank} was given another run than process 0 ({how})")
    ranks.rows(batch_of(corpus.train, config.batch_size, step=0, seed=config.seed))
    if config.units is not None and config.replace == "resample":
        raise ValueError(
            "replace='resample' takes values from other sequences of the batch, which several processes divide: learn "
            "in one process, or choose another replacement"
        )


@contextmanager
def _locked(folder: RunFolder | None, ranks: Ranks) -> Iterator[None]:
    """Within the block, the first rank holds the lock of a run's folder, if there is one."""
    with ExitStack() as stack:
        if folder is not None:
            ranks.first_does(lambda: stack.enter_context(folder.lock()))
        yield


def _learn(job: _Job) -> Found:
    """Make attempts until one is stable, starting where the run was interrupted, if it was."""
    start, history = _take_up(job)
    earlier: tuple[Rollback, ...] = ()  # of earlier attempts
    while True:
        try:
            found = _attempt(job, start, history)
        except _Exploded as trouble:
            start = _roll_back(job, trouble, start, history)
            del history[start.step :]
            continue
        if found.stopped_because != "unstable" or start.attempt >= job.config.retries:
            break
        earlier += start.rollbacks
        start, history = Checkpoint({}, 0, start.attempt + 1, 0.0), []
    found = replace(found, rollbacks=(*earlier, *start.rollbacks), attempts=start.attempt + 1)
    found = job.ranks.first_does(partial(_finish, job, found))
    if any(job.ranks.gather(job.interrupt.is_set())):
        where = f"is saved in {str(job.folder.path)!r}; rerun the command to go on" if job.folder else "is not saved"
        raise KeyboardInterrupt(f"interrupted when learning was done; the subnetwork {where}")
    return found


def _finish(job: _Job, found: Found) -> Found:
    """Polish what was found, if the recipe asks for it, write it, and tell the callbacks."""
    if job.config.polish:
        found = _polish(job, found)
    if job.folder:
        job.folder.finish(found.mask, found.outcome)
    tell_end(job.callbacks, found)
    return found


def _attempt(job: _Job, start: Checkpoint, history: list[StepRecord]) -> Found:
    """Run the loop once, from a state; the records of its steps are appended to `history`."""
    model, target, config, ranks = job.model, job.target, job.config, job.ranks
    learned_with = _with_short_steps(model, target, config)
    learner = Learner(job.candidates, learned_with, job.within, start, job.apart, by_block=job.is_sharded)
    gates, stopped_because = learner.gates, "max_steps"
    guessing = math.log(n_outputs(model)) * (target.most_places if isinstance(target, PlacedTarget) else 1)
    shards = learner.sharded(model, ranks) if job.is_sharded else nullcontext()
    with (
        job.candidates.applied(gates), lean_forward(model), _memory_saved(model, config), shards,
        _bar(job, start) as bar,
    ):  # fmt: skip
        for step in range(start.step, config.max_steps):
            learner.remember(step)

            # schedules
            sparsity_weight = next_sparsity_weight(history, config.sparsity_weight)
            due = share_due(step, learner.share, config.max_steps)
            learner.harden(step, due)

            # forward and backward: the gradient of the loss is added to that of the penalty, and both over ranks
            tokens, share = _batch(job, learner, step)
            loss = partial(_loss, model, target, tokens, share)
            learner.attack(step, loss, ranks)
            penalty, undecided, decided = gates.penalise(sparsity_weight)
            learner.count_once(ranks)
            cross_entropy = loss()
            cross_entropy.backward()
            learner.descend(ranks)

            # record the step as all ranks agree on it, and roll back if the loss exploded
            record = learner.record(step, cross_entropy.item(), penalty, undecided, due, sparsity_weight)
            is_due = job.written is not None and job.written.checkpoint_is_due(learner.checkpoint_size)
            told = _Told(record, undecided, decided, is_due, learner.is_finite(), job.interrupt.is_set())
            record, undecided, decided, is_due, is_finite, is_interrupted = _agreed(ranks.gather(told))
            what = explosion(record, history, guessing)
            what = what or (None if is_finite else "the gradient is not finite")
            if what:
                raise _Exploded(what, step, learner.good, learner.seconds)
            history.append(record)
            _note(job, bar, record)
            if undecided < config.stop_undecided * decided and learner.may_stop(step, decided):
                stopped_because = "decided"
                break
            _keep(job, learner, step + 1, is_due, is_interrupted)
    if gates.is_hard and len(history) == config.max_steps:
        stopped_because = "planned"
    settled = [record.cross_entropy for record in history[gates.settles_at :]]
    if is_unstable(settled, config.recovery_steps, few=isinstance(target, PlacedTarget)):
        stopped_because = "unstable"
    return _end(job, learner, history, stopped_because)


def _batch(job: _Job, learner: Learner, step: int) -> tuple[Integer[Tensor, "batch pos"], float]:
    """This rank's sequences of a step's batch, and their share of it."""
    whole = batch_of(job.corpus.train, job.config.batch_size, step=step, seed=learner.seed)
    if step < learner.config.short_steps:
        whole = whole[:, : job.config.short_length]
    own = job.ranks.rows(whole)
    return own.to(learner.device), len(own) / len(whole)


def _loss(model: Model, target: Target, tokens: Integer[Tensor, "batch pos"], share: float) -> Float[Tensor, ""]:
    """The mean cross-entropy from a target to the model as it is gated, times the share of these sequences."""
    mean = mean_cross_entropy(model, target, tokens)
    return mean if share == 1 else mean * share


class _Told(NamedTuple):
    """What a rank knows after a step."""

    record: StepRecord
    undecided: int
    decided: int
    is_due: bool
    is_finite: bool
    is_interrupted: bool


def _agreed(told: Sequence[_Told]) -> _Told:
    """What all ranks go by: the sum of their losses; whether any is interrupted or not finite; else the first's."""
    record = told[0].record
    if len(told) > 1:
        record = replace(record, cross_entropy=sum(one.record.cross_entropy for one in told))
    is_finite, is_interrupted = all(one.is_finite for one in told), any(one.is_interrupted for one in told)
    return told[0]._replace(record=record, is_finite=is_finite, is_interrupted=is_interrupted)


def _note(job: _Job, bar: Any, record: StepRecord) -> None:
    """Report a step: progress bar, `progress.jsonl` and callbacks."""
    if not job.ranks.is_first:
        return
    bar.set_postfix_str(
        f"CE {record.cross_entropy:.3f}, kept {100 * record.fraction:.2f}%, undecided {100 * record.undecided:.2f}%",
        refresh=False,
    )
    bar.update()
    if job.folder:
        job.folder.log(record)
    tell_step(job.callbacks, record)


def _keep(job: _Job, learner: Learner, steps: int, is_due: bool, stop: bool) -> None:
    """Write a checkpoint if one is due or the run is interrupted; raise KeyboardInterrupt if it is."""
    if job.folder and (stop or is_due) and (job.ranks.is_first or job.is_sharded):
        state = learner.pack(steps)
        if job.written:
            job.written.write_checkpoint(state)
    if stop:
        job.ranks.gather(None)  # nobody ends before it is written
        kept = "nothing is kept"
        if job.folder:
            kept = f"its state is kept in {str(job.folder.path)!r}, and the same command continues it"
        raise KeyboardInterrupt(f"interrupted after step {steps} of at most {job.config.max_steps}; {kept}")


def _end(job: _Job, learner: Learner, history: list[StepRecord], stopped_because: str) -> Found:
    """The result of an attempt, with the gap between soft gates and mask."""
    mask, last = learner.mask(job.within), len(history) - 1
    tokens, share = _batch(job, learner, last)
    gap = soft_hard_gap(job.model, learner.gates, mask, job.target, tokens, last)
    if job.ranks.size > 1:
        gaps = job.ranks.gather((gap.soft * share, gap.hard * share))
        gap = SoftHardGap(*(sum(each) for each in zip(*gaps, strict=True)))
    return kind_of_found(mask)(mask, history, job.config, stopped_because, learner.seconds, gap)


def _polish(job: _Job, found: Found) -> Found:
    """Polish what was learned. If interrupted, nothing of it is kept: a resumed run polishes again."""
    model, config, began = job.model, job.config, time.monotonic()
    assert isinstance(found, FoundSubnetwork), "the recipe was checked"
    assert not isinstance(job.within, Circuit), "it was checked with the recipe"

    def stop_if_asked() -> None:
        if job.interrupt.is_set():
            kept = "nothing is kept"
            if job.folder:
                kept = f"the same command continues the run in {str(job.folder.path)!r} from its last checkpoint"
            raise KeyboardInterrupt(f"interrupted while the mask was polished; {kept}")

    names = {group.site.name for group in job.candidates.groups if group.unit == "weight"}
    price = config.sparsity_weight / job.candidates.gated_size
    sequences = min(_POLISHED_ON * config.batch_size, len(job.corpus.train))
    tokens = batch_of(job.corpus.train, sequences, step=0, seed=config.seed)
    with _memory_saved(model, config):
        polished = polish_on(
            model, found.subnetwork, job.target, tokens, names, price,
            config.target_fraction is not None, job.within, config.polish, _MOST_MEASURED, config.seed, stop_if_asked,
        )  # fmt: skip
    seconds = found.seconds + time.monotonic() - began
    return replace(found, mask=polished.subnetwork, polish=polished.record, seconds=seconds)


def _memory_saved(model: Model, config: SparsifyConfig) -> Any:
    return recomputed(model) if config.low_memory else nullcontext()


def _bar(job: _Job, start: Checkpoint) -> AbstractContextManager[Any]:
    description = "learning" if start.attempt == 0 else f"learning, attempt {start.attempt + 1}"
    options = {} if job.ranks.is_first else {"disable": True}
    return progress(job.config.max_steps, desc=description, unit="step", initial=start.step, **options)


def _take_up(job: _Job) -> tuple[Checkpoint, list[StepRecord]]:
    """The state to start from, and the records of earlier steps in the same attempt."""
    tensors: dict[str, Tensor] = {}

    def take_up() -> tuple[Checkpoint, list[StepRecord]]:
        checkpoint, records = job.folder.take_up() if job.folder else (None, [])
        checkpoint = checkpoint or Checkpoint({}, 0, 0, 0.0)
        tensors.update(checkpoint.tensors)
        return replace(checkpoint, tensors={}), records

    checkpoint, records = job.ranks.first_does(take_up)
    checkpoint = replace(checkpoint, tensors=job.ranks.tensors_of_first(tensors))
    history = [record for record in records if record.attempt == checkpoint.attempt]
    assert len(history) == checkpoint.step, f"{len(history)} records before step {checkpoint.step}"
    return checkpoint, history


def _roll_back(job: _Job, trouble: _Exploded, start: Checkpoint, history: Sequence[StepRecord]) -> Checkpoint:
    """The state to continue from after an explosion: the last good one, or the attempt's start if that exploded too.

    Raises:
        ValueError: If a lower learning rate cannot help, or enough were tried.
    """
    what, before = str(trouble), start.rollbacks
    if trouble.step == 0:
        raise ValueError(
            f"{what}: the model's logits or gradients are not finite even before learning; {_why_not_finite(job.model)}"
        ) from None
    if len(before) >= _MOST_ROLLBACKS:
        float32 = "" if _is_float32(job.model) else "float32 (--dtype float32), "
        raise ValueError(
            f"{what}, and exploded or was not finite at learning rates from {rate_after(job.config, 0):g} down to "
            f"{rate_after(job.config, len(before)):g}: try {float32}"
            "a much lower learning rate (--lr), or another --seed"
        ) from None
    good = trouble.good
    if before and good.step <= before[-1].back_to:
        good = Checkpoint({}, 0, good.attempt, 0.0)
    rate = rate_after(job.config, len(before) + 1)
    if job.ranks.is_first:
        note(f"{what}: back to step {good.step}, with learning rate {rate:g}")
    rollbacks = (*before, Rollback(good.attempt, trouble.step, trouble.what, good.step, rate))
    state = replace(good, seconds=trouble.seconds, rollbacks=rollbacks, good_step=good.step or None)
    if job.written:
        earlier = [record for record in job.written.history() if record.attempt < good.attempt]
        job.written.rewind(state, [*earlier, *history[: good.step]])
    return state


def _is_float32(model: Model) -> bool:
    return str(model.cfg.dtype) == "torch.float32"


def _why_not_finite(model: Model) -> str:
    """Why a model's logits may not be finite, and what to do."""
    for name, weight in model.original_model.named_parameters():
        if not weight.isfinite().all():
            return f"its weights hold NaN or infinity ({name.replace('._original_component', '')}): they are damaged"
    if not _is_float32(model):
        return "try float32 (--dtype float32)"
    return "look at the logits of this model, and the loss of this target, on a few tokens"


def run_settings(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig,
    within: Mask | None = None,
    apart: Apart | None = None,
) -> RunSettings:
    """The settings that determine a run's result; a run folder belongs to one such set."""
    target = target_of(target, model)
    return RunSettings(
        model=ModelIdentity(
            name=model.cfg.model_name,
            revision=getattr(model.cfg, "revision", None),
            weight_hash=weight_hash(model),
            dtype=str(model.cfg.dtype),
        ),
        corpus=identity_of(corpus),
        target=TargetIdentity(target.kind, target.fingerprint),
        recipe=config,
        within=within.checksum if within else None,
        apart_from=tuple(one.checksum for one in apart.masks) if apart else (),
        overlap_weight=apart.overlap_weight if apart and math.isfinite(apart.overlap_weight) else None,
    )


def identity_of(corpus: Corpus) -> CorpusIdentity:
    """What identifies a text."""
    return CorpusIdentity(
        corpus.source, corpus.fingerprint, corpus.tokenizer_hash, corpus.context_length, corpus.starts or None,
        corpus.sample or None,
    )  # fmt: skip


def _read_found(folder: RunFolder, model: Model, target: Target, config: SparsifyConfig) -> Found | None:
    """The result of a run that is already finished; None if it is not."""
    if not folder.is_finished:
        return None
    mask, outcome = folder.found()
    check_is(model, mask.weight_hash, f"{str(folder.path)!r} was made for {mask.model_name!r}")
    mask.check_fits(model)
    return kind_of_found(mask).of_run(with_pairs(mask, target), folder.history(), config, outcome)


def with_pairs(mask: Mask, target: Target) -> Mask:
    """A mask that was read from a file, with the pairs of prompts of the task that it was learned on."""
    if isinstance(mask, Circuit) and mask.replacement.kind == "counterfactual" and isinstance(target, TaskTarget):
        return mask.with_replacement(replace(mask.replacement, pairs=pairs_of(target.task)))
    return mask


def make_candidates(model: Model, target: Target, corpus: Corpus, config: SparsifyConfig) -> Candidates:
    """What a recipe gates on a model; means are over the training part.

    Raises:
        ValueError: If the model lacks a unit or layer, there is nothing to mask, or the replacement lacks its text.
    """
    plain = Candidates(model, config)
    if config.units is None or config.replace == "zero":
        return plain
    text: Any = spread(corpus.train, _AVERAGED)
    if isinstance(target, TaskTarget):
        text = target.task if config.replace == "counterfactual" else target.task_of(corpus.train)
    whole = replaced(model, plain.everything, config.replace, text=text, seed=config.seed)
    return Candidates(model, config, whole.replacement)


# --- what can interrupt learning -------------------------------------------------------------------------------------


@contextmanager
def _says_what_to_change(folder: RunFolder | None) -> Iterator[None]:
    """Within the block, errors about full memory or a full disk also say what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        kept = f"; {str(folder.path)!r} is intact, and the same command continues the run" if folder else ""
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MemoryError(f"out of memory while learning: {less_memory(error)}{kept} ({reason})") from error
    except OSError as error:
        if folder is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno, f"{error.strerror}; free some space, and the same command continues the run"
        ) from error


@contextmanager
def _interrupt_after_step(*, again: bool = True) -> Iterator[threading.Event]:
    """Within the block, a first Ctrl-C, SIGTERM or SIGHUP only sets the event, so that every step is completed.

    A second one raises at once, unless not `again`: `torchrun` passes on what a terminal has sent to all already. A
    SIGHUP that is ignored (`nohup`) stays ignored.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def request(*_: Any) -> None:
        if again and requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    with signals_handled(request, signal.SIGINT):
        yield requested
