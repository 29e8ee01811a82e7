"""The values that replacements stand for, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.models.activations import NotShownError, batch_size_for, check_tokens, record
from bigram_circuits.models.interventions import intervened, without_hooks
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.models.weights import full_weights
from bigram_circuits.recipe import REPLACEMENTS
from bigram_circuits.replacement import OF_A_TEXT, Means, Pairs, Replacement
from bigram_circuits.text.corpus import in_order, token_array
from bigram_circuits.text.known import KnownSequences

_TOKENS = "embed.hook_in"  # the hook point whose value is the token ids


class Replacer:
    """Gives the values that take the place of activations: `at(name, value)`."""

    def __init__(self, model: Model, replacement: Replacement, names: Sequence[str]) -> None:
        """Check that a replacement has what it needs at these hook points.

        Raises:
            ValueError: If it lacks a mean, or the pairs of prompts.
        """
        self._model, self._replacement, self._names = model, replacement, tuple(names)
        self._donated: Mapping[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        if replacement.kind in OF_A_TEXT:
            for name in names:
                if name not in replacement.means:
                    raise ValueError(f"replace={replacement.kind!r} has no mean of {name}: give text=")
                self._means[name] = torch.from_numpy(replacement.means[name])
        if replacement.kind == "counterfactual" and replacement.pairs is None:
            raise ValueError(
                "replace='counterfactual' needs the pairs of prompts, which a file does not hold: give "
                "text=, a task with counterfactuals"
            )

    @property
    def is_zero(self) -> bool:
        """Whether the values are all 0."""
        return self._replacement.kind == "zero"

    @property
    def donates(self) -> bool:
        """Whether the values come from a forward pass of the full model on other sequences."""
        return self._replacement.kind in ("resample", "counterfactual")

    def at(self, name: str, value: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "..."]:
        """The values that take the place of an activation; their shape broadcasts to its shape.

        Raises:
            ValueError: If there are none for this batch: it is longer than the text of a mean by position.
        """
        if self.is_zero:
            return value.new_zeros(())
        if self.donates:
            return self._donated[name].to(value)
        mean = self._means[name] = self._means[name].to(value.device)
        if mean.ndim == 1:
            return mean.to(value.dtype).view(value.shape[2:])
        if value.shape[1] > len(mean):
            raise NotShownError(
                f"replace='mean_by_position' knows {len(mean)} positions, but there is a sequence of {value.shape[1]}"
            )
        return mean[: value.shape[1]].to(value.dtype).view(value.shape[1:])

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within the `with` block, every forward pass first takes what it needs from the full model."""
        if self._replacement.kind in ("zero", "mean"):
            yield
            return
        generate, own = self._model.generate, self._model.__dict__.get("generate")  # each step must see all positions
        self._model.__dict__["generate"] = partial(generate, use_past_kv_cache=False)
        try:
            with intervened(self._model, [(_TOKENS, self._take)] if self.donates else []):
                yield
        finally:
            if own is None:
                del self._model.__dict__["generate"]
            else:  # within another block
                self._model.__dict__["generate"] = own
            self._donated = {}

    def _take(self, tokens: Integer[Tensor, "batch pos"], hook: Any) -> None:
        """Run the full model on the sequences that donate to these."""
        others = self._others(tokens)
        with torch.no_grad(), full_weights(self._model), without_hooks(self._model):
            self._donated = record(self._model, others, self._names)[0]

    def _others(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"]:
        if self._replacement.kind == "resample":
            return tokens[partners(len(tokens), self._replacement.seed).to(tokens.device)]
        pairs = self._replacement.pairs
        assert pairs is not None, "checked at the start"
        rows = pairs.known.find(tokens)
        if (rows < 0).any():
            raise NotShownError(
                "replace='counterfactual' is defined on the prompts of its task alone, but there is another sequence"
            )
        others = torch.from_numpy(pairs.others[rows, : tokens.shape[1]].astype(np.int64)).to(tokens)
        missing = tokens.shape[1] - others.shape[1]  # the model was given more padding than the task has
        return torch.nn.functional.pad(others, (0, missing)) if missing > 0 else others


def partners(n: int, seed: int) -> Integer[Tensor, " n"]:
    """For each of n sequences another one, paired at random in one cycle.

    Raises:
        ValueError: If there is only one sequence.
    """
    if n < 2:
        raise NotShownError("resampling takes activations from another sequence, but there is only one")
    order = np.random.default_rng(seed).permutation(n)
    partner = torch.empty(n, dtype=torch.long)
    partner[torch.from_numpy(order)] = torch.from_numpy(np.roll(order, 1))
    return partner


@uses_model
def make_replacement(model: Model, names: Sequence[str], kind: str, text: Any = None, seed: int = 0) -> Replacement:
    """A replacement of the values at hook points.

    Args:
        model: From `load_model`.
        names: The hook points.
        kind: One of `REPLACEMENTS`.
        text: For means: token ids [sequence, position], a corpus (its held-out part), or a task (its prompts; padding
            is left out). For `counterfactual`: a task that has them.
        seed: For `resample`.

    Raises:
        ValueError: If there is no such kind, or it lacks its text.
    """
    if kind not in REPLACEMENTS:
        raise ValueError(f"replace must be one of {', '.join(REPLACEMENTS)}, not {kind!r}")
    plain = Replacement(kind, seed=seed)
    if kind in OF_A_TEXT:
        if text is None:
            raise ValueError(
                f"replace={kind!r} needs a text to average over: give text= (token ids, a corpus, or a task)"
            )
        return replace(plain, means=_means(model, names, kind == "mean_by_position", *_text_and_ends(text)))
    return replace(plain, pairs=pairs_of(text)) if kind == "counterfactual" else plain


def pairs_of(task: Any) -> Pairs:
    """The prompts of a task and their counterfactuals.

    Raises:
        ValueError: If it has none, or is no task.
    """
    if getattr(task, "counterfactual", None) is None:
        what = f"but the task {task.name!r} has none" if hasattr(task, "counterfactual") else "given as text="
        raise ValueError(f"replace='counterfactual' needs a task whose rows have counterfactuals, {what}")
    return Pairs(KnownSequences(task.tokens, task.ends), task.counterfactual)


def _text_and_ends(text: Any) -> tuple[Integer[np.ndarray, "sequence position"], Integer[np.ndarray, " sequence"]]:
    """Token ids, and the last position of each sequence that counts."""
    if hasattr(text, "ends") and hasattr(text, "tokens"):
        return np.asarray(text.tokens), text.ends
    tokens = token_array(text)
    return tokens, np.full(len(tokens), tokens.shape[1] - 1)


def _means(
    model: Model,
    names: Sequence[str],
    by_position: bool,
    tokens: Integer[np.ndarray, "sequence position"],
    ends: Integer[np.ndarray, " sequence"],
) -> Means:
    """Mean activations of the full model over the positions up to the end of each sequence."""
    check_tokens(model, tokens)
    totals: dict[str, Tensor] = {}
    size, at = batch_size_for(model, tokens.shape[1]), 0
    counted = torch.from_numpy(np.arange(tokens.shape[1]) <= ends[:, None])

    def adding(name: str, counts: Tensor) -> Callable[..., None]:
        def add(value: Tensor, hook: Any) -> None:
            total = (value.flatten(2).double() * counts[..., None].to(value.device)).sum(0).cpu()
            totals[name] = totals[name] + total if name in totals else total

        return add

    with torch.inference_mode(), full_weights(model):
        for batch in in_order(tokens, size):
            counts = counted[at : at + len(batch)]
            at += len(batch)
            model.run_with_hooks(batch.to(model.cfg.device), fwd_hooks=[(name, adding(name, counts)) for name in names])
    n = counted.sum(0).double()[:, None]
    means = {name: total / n if by_position else total.sum(0) / n.sum() for name, total in totals.items()}
    return {name: mean.float().numpy() for name, mean in means.items()}
