"""The state in which a model is used: one thread at a time, in eval mode, on raw weights, with torch's usual defaults.

Every public function that runs a model enters through `in_use` (usually as the decorator `uses_model`). Within it

- no other thread can use the model, since a mask changes it;
- the model is in eval mode, so that dropout does not change results;
- gradients can be computed, whatever the caller's `torch.no_grad()` or `torch.inference_mode()`;
- new tensors are float32 on the CPU unless said otherwise, and autocast is off, whatever the caller's defaults;

and afterwards everything is as before, also after an exception. A model with processed weights (compatibility mode)
is refused, because a mask of folded or centred weights means something else.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch

from bigram_circuits.models.model import Model

P = ParamSpec("P")
R = TypeVar("R")

Memo = dict[Any, Any]

_PATIENCE = 30.0  # seconds to wait for another thread to leave a `with` block


def check_model(model: Model) -> None:
    """Raise ValueError unless `model` is a hooked model on its raw weights."""
    if not hasattr(model, "cfg") or not hasattr(model, "run_with_hooks"):
        kind = type(model).__name__
        if hasattr(model, "get_output_embeddings"):
            raise ValueError(f"a {kind} is not hooked: pass load_model(model, tokenizer=...)")
        raise ValueError(f"a {kind} is not a model: pass one from load_model")
    if getattr(model, "compatibility_mode", False) or getattr(model, "_weights_processed", False):
        raise ValueError(
            "masks apply to raw weights, but this model is in compatibility mode, in which weights are folded and "
            "centred: load it again and leave out enable_compatibility_mode"
        )


@contextmanager
def in_use(model: Model, by: str, *, block: bool = False) -> Iterator[Memo]:
    """Within the `with` block, the calling thread alone uses the model, in the state described above.

    Args:
        model: From `load_model`.
        by: What uses it, for the error of another thread.
        block: True for a `with` block of the user's, which may stay open for long: another thread gives up waiting for
            it, and torch and the model keep the modes that the user has set: only the lock is taken.

    Yields:
        The memo of the outermost call: see `memo`.

    Raises:
        ValueError: If it is not a hooked model on its raw weights.
        RuntimeError: If another thread keeps the model masked.
    """
    check_model(model)
    with _turn_of(model).taken(by, block):
        if block:
            yield Memo()
            return
        with usual_torch(), _eval_mode(model), _memo() as known:
            yield known


def uses_model(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose first argument is the model: it runs within `in_use`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs.get("model")
        with in_use(model, function.__name__):
            return function(*args, **kwargs)

    return run


# --- what is remembered within a call ---

_CALLS = threading.local()


def memo() -> Memo | None:
    """A dictionary that lives as long as the outermost public call of this thread, during which nobody edits weights.

    None outside of such a call: whatever depends on weights must then be computed again.
    """
    return getattr(_CALLS, "memo", None)


@contextmanager
def _memo() -> Iterator[Memo]:
    before = memo()
    _CALLS.memo = {} if before is None else before
    try:
        yield _CALLS.memo
    finally:
        _CALLS.memo = before


# --- one thread at a time ---


class _Turn:
    """A lock that a thread may take several times, and that knows what it was taken for.

    It is given back by leaving the `with` block, in whichever thread that happens: a generator that holds a model
    masked may be closed by another thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: threading.Thread | None = None
        self._held: list[tuple[str, bool]] = []  # by what, and whether that is a block of the user's

    @contextmanager
    def taken(self, by: str, block: bool) -> Iterator[None]:
        mine = (by, block)
        self._take(mine)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(mine)
                if not self._held:
                    self._owner = None
                    self._changed.notify_all()

    def _take(self, mine: tuple[str, bool]) -> None:
        me, began = threading.current_thread(), time.monotonic()
        with self._changed:
            while self._owner not in (None, me):
                by, block = self._held[0]
                if block and time.monotonic() - began > _PATIENCE:
                    assert self._owner is not None
                    raise RuntimeError(
                        f"this model is in use in another thread ({self._owner.name!r}), inside `with {by}(...)`: "
                        f"leave that block first, or load the model a second time for this thread"
                    )
                self._changed.wait(min(1.0, _PATIENCE))
            self._owner = me
            self._held.append(mine)


_TURNS: WeakKeyDictionary[Any, _Turn] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def _turn_of(model: Model) -> _Turn:
    """The lock of a model: that of the wrapped one, which two bridges may share."""
    wrapped = getattr(model, "original_model", model)
    with _TURNS_LOCK:
        return _TURNS.setdefault(wrapped, _Turn())


# --- the model's mode ---


@contextmanager
def _eval_mode(model: Model) -> Iterator[None]:
    """Within the `with` block, every module of a model is in eval mode; each gets back its own mode."""
    wrapped = getattr(model, "original_model", None)
    modules = {id(module): module for owner in (model, wrapped) if owner is not None for module in owner.modules()}
    training = [module for module in modules.values() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def parameters_frozen(model: Model) -> Iterator[None]:
    """Within the `with` block, no parameter of a model receives a gradient."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


# --- torch's defaults ---


@contextmanager
def usual_torch() -> Iterator[None]:
    """Within the `with` block, torch has its usual defaults: gradients, float32, the CPU, no autocast."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_FLOAT32)
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Float32:
    """Makes float32 the default precision until the last thread has left: the default belongs to the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.set_default_dtype(self._before)


_FLOAT32 = _Float32()
