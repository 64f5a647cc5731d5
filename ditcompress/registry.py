"""A folder of modules is a registry: a file is registered under its own name, nothing else is edited."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from .errors import DitcompressError


def nearest(name: str, names: list[str]) -> str:
    """' (did you mean X?)' for the nearest of `names`, or the list of them."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(names))}"


class Registry:
    """The public modules of a package (no leading underscore, not `base`, no package), imported when asked for.

    `exports` are the attributes every module must have; one that lacks any is our bug and raises TypeError.
    """

    def __init__(self, package: str, kind: str, exports: tuple[str, ...]) -> None:
        self.package, self.kind, self.exports = package, kind, exports
        self._found: dict[str, ModuleType] = {}  # asked for at every layer: the folder is not read each time

    def names(self) -> list[str]:
        path = importlib.import_module(self.package).__path__
        found = (module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
        return sorted(n for n in found if not n.startswith("_") and n != "base")

    def get(self, name: str) -> ModuleType:
        if name not in self._found:
            self._found[name] = self._import(name)
        return self._found[name]

    def _import(self, name: str) -> ModuleType:
        names = self.names()
        if name not in names:
            raise DitcompressError("E201", f"{self.kind} {name!r}", "is not known", nearest(name, names))
        module = importlib.import_module(f"{self.package}.{name}")
        missing = [e for e in self.exports if not hasattr(module, e)]
        if missing:
            raise TypeError(f"{module.__name__} must define {', '.join(missing)}")
        return module

    def all(self) -> dict[str, ModuleType]:
        return {name: self.get(name) for name in self.names()}
