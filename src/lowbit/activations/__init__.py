"""Input functions: what rounds a layer's input. One file a method; the folder is the table.

activation_methods(), activation_method("sign");  attach(layer, function), attached(layer)
"""

from lowbit.activations._function import InputFunction, InputSpec, attach, attached
from lowbit.errors import RecipeError, near_names

__all__ = ["InputFunction", "InputSpec", "activation_method", "activation_methods", "attach", "attached"]


def activation_methods() -> dict[str, InputSpec]:
    """Every method in this folder, by name."""
    import lowbit.activations as package
    from lowbit._registry import discover

    return discover(package)


def activation_method(name: str) -> InputSpec:
    """The method called `name`. Raises RecipeError with the nearest names."""
    methods = activation_methods()
    if name not in methods:
        raise RecipeError(f"unknown activations {name!r}. {near_names(str(name), list(methods))}")
    return methods[name]
