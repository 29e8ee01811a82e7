"""How types are checked when tests run: by beartype, in a context of jaxtyping's where a signature has shapes.

The option `--jaxtyping-packages` has every function of the package decorated with `jaxtyping.jaxtyped`, which binds and
checks the arguments twice at each call, and compiles three functions for each one that it decorates. Here, beartype
compiles its one check of a function at the first call, since most functions are never called by one worker's tests.
Functions made within a function, anew at every call of it, are left to pyright unless they have shapes; generators with
shapes are left to jaxtyping, whose context would end before they run.

`tests/conftest.py` imports this module before it imports the package.
"""

import dataclasses
import functools
import inspect
from types import CodeType, FunctionType
from typing import Any

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped
_HINTS: dict[CodeType, dict[str, Any]] = {}


def checked(decorated: Any, *, typechecker: Any) -> Any:
    """Check the arguments and results of a function, or of a dataclass, as annotated."""
    if not isinstance(decorated, FunctionType):
        made = vars(decorated).get("__init__") if dataclasses.is_dataclass(decorated) else None
        if made is not None and not hasattr(made, "__wrapped__"):
            decorated.__init__ = checked(made, typechecker=typechecker)
        return decorated
    if "<locals>" in decorated.__qualname__ and not has_shapes(decorated):
        return decorated
    check = None

    @functools.wraps(decorated)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal check
        if check is None:
            check = compiled(decorated, typechecker)
        return check(*args, **kwargs)

    return call


def has_shapes(function: FunctionType) -> bool:
    return any("jaxtyping." in repr(hint) for hint in _hints_of(function).values())


def compiled(function: FunctionType, typechecker: Any) -> Any:
    """The function with its check; shapes agree among the arguments and results of one call."""
    shaped = has_shapes(function)
    if shaped and inspect.isgeneratorfunction(function):
        return _jaxtyped(function, typechecker=typechecker)
    written, function.__annotations__ = function.__annotations__, _hints_of(function)
    check = typechecker(function)
    function.__annotations__ = check.__annotations__ = written
    if not shaped:
        return check

    def in_context(*args: Any, **kwargs: Any) -> Any:
        with _jaxtyped("context"):
            return check(*args, **kwargs)

    return in_context


def _hints_of(function: FunctionType) -> dict[str, Any]:
    """The annotations of a function, evaluated: Any for those whose names are there for type checkers only."""
    code = function.__code__
    if code not in _HINTS:
        _HINTS[code] = {name: _evaluated(hint, function) for name, hint in function.__annotations__.items()}
    return _HINTS[code]


def _evaluated(hint: Any, function: FunctionType) -> Any:
    try:
        return eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except NameError:
        return Any


def _decorator(*, typechecker: Any) -> Any:
    return lambda decorated: checked(decorated, typechecker=typechecker)


jaxtyping.jaxtyped = _decorator
