"""Where things come from: float models (GGUF, safetensors, the hub) and texts.

source = open_model("model.gguf")           headers only
w = source.get("model.layers.0.mlp.down_proj.weight")
model = source.new_skeleton();  fill(model, source)

text = read_text("valid.txt[:50%]")
ids = token_windows(text, source.load_tokenizer(), windows=24, context=512, seed=0).ids
"""

from lowbit.sources.base import ModelSource, check_finite
from lowbit.sources.models import open_model
from lowbit.sources.skeleton import drop, fill, new_skeleton, set_tensor
from lowbit.sources.texts import read_text
from lowbit.sources.windows import Windows, check_tokenizer, foreign_note, token_ids, token_windows

__all__ = [
    "ModelSource",
    "Windows",
    "check_finite",
    "check_tokenizer",
    "drop",
    "fill",
    "foreign_note",
    "new_skeleton",
    "open_model",
    "read_text",
    "set_tensor",
    "token_ids",
    "token_windows",
]
