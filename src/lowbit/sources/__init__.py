"""Where things come from: float models (GGUF, safetensors, the hub) and texts.

    source = open_model("model.gguf")           headers only
    w = source.get("model.layers.0.mlp.down_proj.weight")
    model = source.new_skeleton();  fill(model, source)
"""

from lowbit.sources.base import ModelSource, check_finite
from lowbit.sources.models import open_model
from lowbit.sources.skeleton import drop, fill, new_skeleton, set_tensor

__all__ = ["ModelSource", "check_finite", "drop", "fill", "new_skeleton", "open_model", "set_tensor"]
