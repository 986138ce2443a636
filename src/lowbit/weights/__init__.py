"""Weight functions: parametrizations put on a weight. They train with the model and fold into packed codes."""

from lowbit.weights.quantize import Quantize

__all__ = ["Quantize"]
