"""A registry backed by a folder of modules: each module in the folder is an entry.

The command line, the docs and the tests need the names of masking methods and targets, and adding one should take one
new file. So the names are the module names, which are listed without importing anything; a module is imported only when
its entry is looked up.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class FolderOf(Mapping[str, T], Generic[T]):
    """Maps the module names of a sub-package, in alphabetical order, to one attribute of each module.

    Modules whose name begins with an underscore, and a module called `base`, are not entries.
    """

    def __init__(self, package: str, attribute: str) -> None:
        """List the modules of `package`, a sub-package such as `masking.methods`, without importing it."""
        self._package, self._attribute = f"bigram_circuits.{package}", attribute
        folder = Path(__file__).parent.joinpath(*package.split("."))
        self._names = tuple(
            sorted(
                module.name
                for module in pkgutil.iter_modules([str(folder)])
                if module.name != "base" and not module.name.startswith("_")
            )
        )

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return getattr(import_module(f"{self._package}.{name}"), self._attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
