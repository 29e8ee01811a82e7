"""A folder of modules as a mapping: what is in the folder is what there is.

The command line, the docs and the tests ask for the names of masking methods and of targets, and a new one should cost
one new file. So the names are the file names, which are listed without importing anything, and what a module offers is
looked up when it is needed.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class FolderOf(Mapping[str, T], Generic[T]):
    """What the modules of a sub-package offer under one attribute, by module name, in alphabetical order.

    Modules whose name begins with an underscore, and a module called `base`, are not entries.
    """

    def __init__(self, package: str, attribute: str) -> None:
        """`package` is a sub-package of this one, such as `masking.methods`; it is not imported here."""
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
