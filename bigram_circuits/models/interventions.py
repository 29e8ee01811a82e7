"""Forward hooks that are part of a masked model: they stay until their `with` block ends, and can be switched off."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import ModuleList

from bigram_circuits.models.model import Model

Hook = tuple[str, Callable[..., Any]]
"""Name of a hook point, and a function of its value and the hook point, as `run_with_hooks` takes them."""


class _Switch:
    """Whether some hooks are at work."""

    on = True


_SWITCHES: WeakKeyDictionary[Any, list[_Switch]] = WeakKeyDictionary()


@contextmanager
def intervened(model: Model, hooks: Sequence[Hook]) -> Iterator[None]:
    """Within the `with` block, a model has these forward hooks, also after `model.reset_hooks()`.

    Raises:
        KeyError: If there is no hook point of that name.
    """
    switch, placed = _Switch(), []
    switches = _SWITCHES.setdefault(_key(model), [])
    try:
        for name, hook in hooks:
            switched = _switched(switch, hook)
            model.add_hook(name, switched, is_permanent=True)
            placed.append((name, switched))
        switches.append(switch)
        yield
    finally:
        if switch in switches:
            switches.remove(switch)
        for name, switched in placed:
            _remove(hook_point(model, name), switched)


@contextmanager
def not_intervened(model: Model) -> Iterator[None]:
    """Within the `with` block, the hooks of `intervened` do nothing."""
    switches = [switch for switch in _SWITCHES.get(_key(model), []) if switch.on]
    for switch in switches:
        switch.on = False
    try:
        yield
    finally:
        for switch in switches:
            switch.on = True


@contextmanager
def without_hooks(model: Model) -> Iterator[None]:
    """Within the `with` block, no forward hook is called that is there on entry, whoever added it."""
    with ExitStack() as stack:
        for point in {id(point): point for point in model.hook_dict.values()}.values():
            if point._forward_hooks:
                stack.callback(setattr, point, "_forward_hooks", point._forward_hooks)
                point._forward_hooks = OrderedDict()
        yield


def hook_point(model: Model, name: str) -> Any:
    """The hook point of a name, which may be an alias; None if there is none."""
    part: Any = model
    for step in name.split("."):
        if not step.isdigit():
            part = getattr(part, step, None)
        elif isinstance(part, Sequence | ModuleList) and int(step) < len(part):
            part = part[int(step)]
        else:
            return None
        if part is None:
            return None
    return part


def _key(model: Model) -> Any:
    return getattr(model, "original_model", model)


def _switched(switch: _Switch, hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(value: Any, hook: Any, _do: Callable[..., Any] = hook) -> Any:
        return _do(value, hook=hook) if switch.on else None

    return call


def _remove(point: Any, hook: Callable[..., Any]) -> None:
    for handle in [one for one in point.fwd_hooks if one.user_hook is hook]:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)
