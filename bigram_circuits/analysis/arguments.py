"""The order of arguments: model, subnetwork, target, tokens, in every function of a model and a text.

Subnetwork and target may be left out: `logit_lens(model, tokens)`, `logit_lens(model, subnetwork, tokens)`; a circuit
stands where a subnetwork does. What a
function needs besides (the part to ablate, the neurons to look at) comes right after the model. Another order, in
which an earlier version took them, still works, with a DeprecationWarning that says the present one.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from bigram_circuits.circuit import Circuit
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import is_target

P = ParamSpec("P")
R = TypeVar("R")

_SUBNETWORK, _TARGET = "subnetwork", "target"


def usual_order(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function with the parameters `..., subnetwork, [target], text, *, ...`: see this module."""
    positional = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    own, slots = positional[: positional.index(_SUBNETWORK)], positional[positional.index(_SUBNETWORK) :]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first, rest = args[: len(own)], args[len(own) :]
        if len(rest) > len(slots):
            raise TypeError(f"{function.__name__} takes {', '.join(positional)} in this order, not {len(args)} values")
        named = _placed(rest, slots)
        if named is None:
            named = _sorted(rest, slots)
            if named is not None:
                order = ", ".join(positional)
                warnings.warn(
                    f"{function.__name__} takes its arguments in the order {order} now",
                    DeprecationWarning,
                    stacklevel=2,
                )
        twice = slots if named is None else [name for name in named if name in kwargs]
        if named is None or twice:
            raise TypeError(f"{function.__name__} takes {', '.join(positional)} in this order; {twice[0]} came twice")
        return function(*first, **named, **kwargs)  # type: ignore[arg-type]

    return call


def _placed(values: tuple[Any, ...], slots: list[str]) -> dict[str, Any] | None:
    """The values by parameter, if they are in order, possibly with some left out; else None."""
    found: dict[str, Any] = {}
    rest = iter(slots)
    for value in values:
        slot = next((slot for slot in rest if _may_be(value, slot)), None)
        if slot is None:
            return None
        found[slot] = value
    return found


def _sorted(values: tuple[Any, ...], slots: list[str]) -> dict[str, Any] | None:
    """The values by parameter, in whatever order they are; None if two are for the same one."""
    found: dict[str, Any] = {}
    for value in sorted(values, key=lambda value: value is None):  # None takes what is left
        slot = next((slot for slot in slots if slot not in found and _may_be(value, slot)), None)
        if slot is None:
            return None
        found[slot] = value
    return found


def _may_be(value: Any, slot: str) -> bool:
    """Whether a value could be meant for a parameter."""
    if value is None:
        return True
    is_subnetwork = any(isinstance(getattr(value, kind.noun, value), kind) for kind in (Subnetwork, Circuit))
    if slot == _SUBNETWORK:
        return is_subnetwork
    is_distribution = not is_subnetwork and (is_target(value) or callable(value))
    return is_distribution if slot == _TARGET else not is_subnetwork and not is_distribution
