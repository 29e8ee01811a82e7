"""How types are checked when tests run: with jaxtyping where a signature has shapes, else with beartype alone.

The option `--jaxtyping-packages` has every function of the package decorated with `jaxtyping.jaxtyped`, which binds the
arguments twice at each call and writes and compiles code for each function it decorates. That is needed for shapes
only. Functions made within a function, anew at every call of it, are left to pyright unless they have shapes.

`tests/conftest.py` imports this module before it imports the package.
"""

from types import CodeType, FunctionType
from typing import Any

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped
_HINTS: dict[CodeType, dict[str, Any]] = {}


def checked(decorated: Any, *, typechecker: Any) -> Any:
    """Check the arguments and results of a function, or of a dataclass, as annotated."""
    if not isinstance(decorated, FunctionType):
        return _jaxtyped(decorated, typechecker=typechecker)
    hints = _hints_of(decorated)
    if any("jaxtyping." in repr(hint) for hint in hints.values()):
        return _jaxtyped(decorated, typechecker=typechecker)
    if "<locals>" in decorated.__qualname__:
        return decorated
    written, decorated.__annotations__ = decorated.__annotations__, hints
    wrapped = typechecker(decorated)
    decorated.__annotations__ = wrapped.__annotations__ = written
    return wrapped


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
