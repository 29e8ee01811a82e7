"""Forward passes that begin at a later block, where an earlier pass has shown what the blocks before it return.

Ablating something in block L leaves the blocks before L as they were: a sweep over parts need not run them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from bigram_circuits.models.activations import forwards_replaced
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import memo

_TRIED = "can_resume"  # key in the memo
_TOLERANCE = 1e-5  # of the largest logit: sums may be done in another order


@contextmanager
def outputs_recorded(model: Model) -> Iterator[list[Any]]:
    """Within the `with` block, what each block returns in a forward pass is appended to the list yielded."""
    outputs: list[Any] = []

    def recording(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    with forwards_replaced({block: partial(recording, block.forward) for block in model.blocks}):
        yield outputs


@contextmanager
def resumed(model: Model, outputs: Sequence[Any], first: int) -> Iterator[None]:
    """Within the `with` block, forward passes do not run the blocks before `first`, which return these outputs.

    They must be of the same tokens, and of the same model up to there.
    """

    def known(output: Any, *args: Any, **kwargs: Any) -> Any:
        return output

    with forwards_replaced({model.blocks[layer]: partial(known, outputs[layer]) for layer in range(first)}):
        yield


class KnownPasses:
    """Batches that pass through a model again and again, from the block where a pass begins to differ from the first.

    The first pass of each batch (`first_pass`) shows what the blocks return. Where that is not all that a later block
    needs (`can_resume`), every pass is whole.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._can_resume = model, can_resume(model)
        self._outputs: list[list[Any]] = []

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Within the `with` block, the next batch passes through the model for the first time."""
        with outputs_recorded(self._model) if self._can_resume else nullcontext([]) as outputs:
            yield
        self._outputs.append(outputs)

    def again(self, batch: int, layer: int, rows: int | None = None) -> AbstractContextManager[None]:
        """Within the `with` block, the batch of this index passes again, the same as before up to this layer's block.

        With `rows`, only so many of its first rows.
        """
        if not self._can_resume or layer == 0:
            return nullcontext()
        known = self._outputs[batch]
        return resumed(self._model, known if rows is None else [_first_rows(one, rows) for one in known], layer)


def _first_rows(output: Any, rows: int) -> Any:
    """What a block returns, for the first rows of a batch."""
    if isinstance(output, torch.Tensor):
        return output[:rows]
    return tuple(_first_rows(one, rows) for one in output) if isinstance(output, tuple) else output


def can_resume(model: Model) -> bool:
    """Whether a forward pass that begins at a later block is the same, and no one can tell.

    It is not if someone has put hooks on a block, which would not be called, or if a block reads more than what the one
    before it returns, such as the keys and values of an earlier one. The latter is tried out for every block on a few
    tokens, once within a call of a public function.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None or len(blocks) < 2 or any(_is_watched(module) for block in blocks for module in block.modules()):
        return False
    known = memo()
    if known is None:
        return _same_from_every_block(model)
    tried: WeakKeyDictionary[Model, bool] = known.setdefault(_TRIED, WeakKeyDictionary())
    if model not in tried:
        tried[model] = _same_from_every_block(model)
    return tried[model]


def _is_watched(module: Any) -> bool:
    """Whether it has hooks other than TransformerLens' own, which only prepare what its block computes."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    is_hook_point = hasattr(module, "fwd_hooks")
    return any(is_hook_point or not _module_of(hook).startswith("transformer_lens.") for hook in hooks)


def _module_of(hook: Any) -> str:
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__module__", None) or ""


def _same_from_every_block(model: Model) -> bool:
    tokens = torch.arange(8, device=model.cfg.device).view(2, 4) % model.cfg.d_vocab
    with torch.inference_mode():
        with outputs_recorded(model) as outputs:
            logits = model(tokens)
        if len(outputs) != len(model.blocks):
            return False
        most = _TOLERANCE * float(logits.abs().max())
        for first in range(1, len(outputs)):
            try:
                with resumed(model, outputs, first):
                    again = model(tokens)
            except Exception:  # whatever it is: a block looked for something that an earlier one should have left
                return False
            if not float((again - logits).abs().max()) <= most:
                return False
    return True
