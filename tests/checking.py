"""How types are checked when tests run: with jaxtyping where a signature has shapes, else with beartype alone.

The option `--jaxtyping-packages` has every function of the package decorated with `jaxtyping.jaxtyped`, which binds the
arguments twice at each call and writes and compiles code for each function it decorates. That is needed for shapes
only. Functions made within a function, anew at every call of it, are left to pyright unless they have shapes.

`tests/conftest.py` imports this module before it imports the package.
"""

import re
from types import FunctionType
from typing import Any

import jaxtyping

_SHAPES = re.compile(r"\b(Bool|Complex|Float|Inexact|Int|Integer|Num|Real|Shaped|UInt)\d*\[")
_jaxtyped = jaxtyping.jaxtyped


def checked(decorated: Any, *, typechecker: Any) -> Any:
    """Check the arguments and results of a function, or of a dataclass, as annotated."""
    if not isinstance(decorated, FunctionType) or _has_shapes(decorated):
        return _jaxtyped(decorated, typechecker=typechecker)
    if "<locals>" in decorated.__qualname__:
        return decorated
    written = decorated.__annotations__
    decorated.__annotations__ = {name: _meant(hint, decorated.__globals__) for name, hint in written.items()}
    wrapped = typechecker(decorated)
    decorated.__annotations__ = wrapped.__annotations__ = written
    return wrapped


def _has_shapes(function: FunctionType) -> bool:
    return any(_SHAPES.search(str(hint)) for hint in function.__annotations__.values())


def _meant(hint: Any, names: dict[str, Any]) -> Any:
    """An annotation that may be a string; Any where its names are there for type checkers only."""
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except Exception:
        return Any


def _decorator(*, typechecker: Any) -> Any:
    return lambda decorated: checked(decorated, typechecker=typechecker)


jaxtyping.jaxtyped = _decorator
