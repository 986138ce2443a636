"""The folder is the table: one method, one file, one SPEC."""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def discover(package: ModuleType) -> dict[str, Any]:
    """name -> SPEC of every module in the package whose file name has no leading underscore, in file-name order.

    Raises RuntimeError where two files give the same name or one has no SPEC.
    """
    table: dict[str, Any] = {}
    for info in sorted(iter_modules(package.__path__), key=lambda m: m.name):
        if info.name.startswith("_"):
            continue
        module = import_module(f"{package.__name__}.{info.name}")
        spec = getattr(module, "SPEC", None)
        if spec is None:
            raise RuntimeError(
                f"{module.__name__} has no SPEC; give it one, or start its file name with an underscore."
            )
        if spec.name in table:
            raise RuntimeError(
                f"two files of {package.__name__} call themselves {spec.name!r}; the second is {module.__name__}."
            )
        table[spec.name] = spec
    return table
