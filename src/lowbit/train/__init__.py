"""Reference training runs: tasks (data sets), networks for them, recipes, and the loop that trains them.

    result = lowbit.train.run("digits-ternary", "out/")        what `lowbit train digits-ternary -o out` does
    net = lowbit.train.load_trained("out/")                    the packed network of the first seed

The folder: train.json (recipe, rows), seed-0/checkpoint.safetensors, seed-0/packed/ (an artifact), report.html.
"""

from typing import Any

__all__ = ["TrainRecipe", "load_recipe", "load_trained", "run", "shipped"]

_HOME = {"TrainRecipe": "recipe", "load_recipe": "recipe", "shipped": "recipe", "run": "runs", "load_trained": "runs"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
