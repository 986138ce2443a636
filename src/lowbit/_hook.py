"""Run a function when another package's module is imported, at once if it already is; never import it ourselves."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def after_import(module: str, call: Callable[[], object]) -> None:
    """Call `call()` once, as soon as `module` has been executed."""
    if module in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Finder(module, call))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module the way everybody else would, and wraps its loader."""

    def __init__(self, module: str, call: Callable[[], object]):
        self.module, self.call = module, call

    def find_spec(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None" = None
    ) -> "importlib.machinery.ModuleSpec | None":
        if name != self.module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # so that the search below does not come back here
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.call)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, followed by a call."""

    def __init__(self, loader: importlib.abc.Loader, call: Callable[[], object]):
        self.loader, self.call = loader, call

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> "ModuleType | None":
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.call()
