"""How well a model does a task under each condition: everything that is measured at the answers, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.analysis.conditions import check_arguments, conditions, reduced_to
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.masking.apply import MaskLike
from bigram_circuits.measures import statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Effects
from bigram_circuits.models.activations import batch_size_for
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.progress import progress
from bigram_circuits.tasks.answers import Answers
from bigram_circuits.tasks.task import Task, batches, checked_task

_ALWAYS = (
    Quantity("loss", "nats", "Surprisal of the answer, the sum over its tokens."),
    Quantity("probability", "share", "Probability of the answer, the product over its tokens."),
    Quantity("accuracy", "share", "Answers each of whose tokens is the most likely one (greedy decoding)."),
    Quantity("kl", "nats", "KL divergence from the full model where the answer is predicted, summed over its tokens."),
)
_WITH_WRONG = (
    Quantity("logit_difference", "nats", "log P(right) - log P(wrong): for two tokens, the difference of logits."),
    Quantity("preferred", "share", "Rows in which the most likely of right and wrong answers is a right one."),
)


@uses_model
def measure_task(model: Model, task: Any, subnetwork: MaskLike | None = None, *, seed: int = 0) -> Effects:
    """Measure a model at the answers of a task, under each condition.

    Args:
        model: From `load_model`.
        task: A `Task` from `load_task`, or one of `TASKS`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        seed: Seed of the matched random subnetwork.

    Returns:
        For every condition, with 95% bootstrap intervals over rows (Efron 1979): `loss` (nats per answer),
        `probability`, `accuracy`, `kl` from the full model, and, if there are wrong answers, `logit_difference` and
        `preferred`. An answer of several tokens is scored token by token, each after the right ones before it: its
        surprisals and KLs are summed, its probability is the product, and it counts as given if each token is the most
        likely one. Where several answers are right, or wrong, their probabilities are summed.

    Raises:
        ValueError: If an argument is wrong, the model cannot read the task's tokens, or its logits are not finite.

    Example:
        >>> bc.measure_task(model, task, found).to_dataframe()  # loss, accuracy and more, for each condition
    """
    kept, _ = check_arguments(model, subnetwork, seed=seed)
    if not isinstance(task, Task):
        raise ValueError(f"measure_task measures a Task, such as load_task returns, not a {type(task).__name__}")
    checked_task(model, task)
    named = conditions(kept, seed=seed)
    rows: dict[str, list[Float[np.ndarray, "row quantity"]]] = {name: [] for name in named}
    with progress(total=len(task) * len(named), desc="measuring answers", unit="row") as bar:
        for part in batches(len(task), batch_size_for(model, task.tokens.shape[1]), smallest=2):
            tokens = torch.from_numpy(task.tokens[part].astype(np.int64)).to(model.cfg.device)
            answers = task.answers.at(torch.arange(part.start, part.stop), tokens.device)
            full = None
            for name, subnetwork in named.items():  # the full model comes first
                with torch.inference_mode(), reduced_to(model, subnetwork):
                    log_probs = answers.read(model(tokens), torch.float64)
                    full = log_probs if full is None else full
                    rows[name].append(_scores(log_probs, answers, full).cpu().numpy())
                bar.update(len(tokens))
    scores = np.stack([np.concatenate(parts) for parts in rows.values()])
    if not np.isfinite(scores).all():
        raise ValueError("the model's probability of an answer is not finite (NaN or infinity in its logits)")
    draws = np.stack([statistics.bootstrap(of_condition) / len(task) for of_condition in scores])
    ends = np.array([[statistics.interval(values) for values in of_condition.T] for of_condition in draws])
    return Effects(
        title=f"Answers of the task {task.name}",
        quantities=_ALWAYS if task.wrong is None else _ALWAYS + _WITH_WRONG,
        subject="condition",
        names=tuple(named),
        values=scores.mean(1).T,
        low=ends[..., 0].T,
        high=ends[..., 1].T,
        notes={
            "rows": len(task),
            "answers_of_several_tokens": int((task.scored.sum(1) > 1).sum()),
            "loss_of_guessing": task.chance * float(task.scored.sum()) / len(task),
            "preferred_by_chance": None if task.wrong is None else task.preferred_by_chance,
            "random_seed": seed,
        },
    )


def _scores(
    log_probs: Float[Tensor, "row place d_vocab"], answers: Answers, full: Float[Tensor, "row place d_vocab"]
) -> Float[Tensor, "row quantity"]:
    """The quantities of every row."""
    log_prob = answers.log_prob(log_probs)
    kl = answers.cross_entropy(full, log_probs) - answers.cross_entropy(full, full)
    columns = [-log_prob, log_prob.exp(), answers.is_first(log_probs).to(log_prob), kl]
    if answers.wrong is not None:
        columns += [answers.log_odds(log_probs), answers.is_preferred(log_probs).to(log_prob)]
    return torch.stack(columns, 1)


@in_suite("task")
def _(subject: Subject) -> dict[str, Effects]:
    if subject.task is None:
        return {}
    return {"task": measure_task(subject.model, subject.task, subject.subnetwork, seed=subject.seed)}
