"""Weight functions: parametrizations put on a weight. They train with the model and fold into packed codes.

One file a method; the folder is the table: weight_methods(), weight_method("s3").
"""

from lowbit.errors import RecipeError, near_names
from lowbit.weights._function import WeightFunction, WeightSpec
from lowbit.weights.quantize import Quantize

__all__ = ["Quantize", "WeightFunction", "WeightSpec", "weight_method", "weight_methods"]


def weight_methods() -> dict[str, WeightSpec]:
    """Every method in this folder, by name."""
    import lowbit.weights as package
    from lowbit._registry import discover

    return discover(package)


def weight_method(name: str) -> WeightSpec:
    """The method called `name`. Raises RecipeError with the nearest names."""
    methods = weight_methods()
    if name not in methods:
        raise RecipeError(f"unknown weights {name!r}. {near_names(str(name), list(methods))}")
    return methods[name]
