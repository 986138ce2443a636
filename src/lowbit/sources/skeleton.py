"""A model's architecture without its weights: parameters on the meta device, buffers real.

Building under `torch.device("meta")` would leave the rotary tables and masks (buffers that no file stores) without
values. Here only weights are kept off memory: `torch.empty` makes meta tensors, and any parameter made another way
moves to meta as it is registered. Everything else (arange, full, ...) is computed for real, so those buffers are right.

`fill` then reads weights in, `drop` sends them back to meta: the walk over the blocks uses the two in turn.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.errors import ModelError
from lowbit.runtime.skeleton import new_skeleton as build_skeleton
from lowbit.runtime.skeleton import without_weights

__all__ = ["drop", "fill", "model_class", "new_skeleton", "set_tensor", "tied_names", "without_weights"]

if TYPE_CHECKING:
    from lowbit.sources.models import ModelSource


def model_class(config: Any) -> type[nn.Module]:
    """The transformers class for a configuration: the one its `architectures` names, else the causal LM,
    or the masked LM for encoders. Raises ModelError when transformers does not ship the architecture."""
    import transformers

    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if config.architectures and getattr(config, "auto_map", None):
        raise ModelError(
            f"architecture {config.architectures[0]} comes with code of its own, which lowbit does not run; "
            "use a model whose architecture transformers ships, or try `pip install -U transformers`."
        )
    masked, causal = transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    order = (causal, masked) if getattr(config, "is_decoder", False) or type(config) not in masked else (masked,)
    for mapping in order:
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ModelError(
        f"model type {config.model_type!r} is neither a causal nor a masked language model in transformers "
        f"{transformers.__version__}; try `pip install -U transformers`, or name the class in config.json's "
        "`architectures`."
    )


def new_skeleton(config: Any, auto: Any = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Instantiate without weight memory, in eval mode, ties made.

    auto:  a model class, or an Auto class such as `AutoModelForMaskedLM`; None picks by `model_class`
    dtype: floating type of parameters and buffers; weights assigned later bring their own
    """
    return build_skeleton(config, auto or model_class(config), dtype)


def tied_names(model: nn.Module) -> dict[str, str]:
    """alias -> the name that owns the memory (the first): lm_head.weight -> model.embed_tokens.weight"""
    owner: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in owner:
            tied[name] = owner[id(p)]
        else:
            owner[id(p)] = name
    return tied


def fill(model: nn.Module, source: "ModelSource", names: Iterable[str] | None = None) -> None:
    """Read `names` (state-dict names; None: all the source has) into the model, one at a time.

    Weights keep the dtype of the source; a tied weight stays one tensor. Raises ModelError for a name that the source
    or the model lacks.
    """
    aliases: dict[str, list[str]] = {}
    for alias, name in source.tied.items():
        aliases.setdefault(name, []).append(alias)
    for name in list(source.keys() if names is None else names):
        name = source.tied.get(name, name)
        first = set_tensor(model, name, source.get(name))
        for alias in aliases.get(name, []):
            _owner(model, alias)._parameters[alias.rpartition(".")[2]] = first  # type: ignore[assignment]


def drop(model: nn.Module, names: Iterable[str]) -> None:
    """Send parameters back to the meta device: their memory is free again. Name the aliases of a tied weight too."""
    for name in names:
        module, leaf = _owner(model, name), name.rpartition(".")[2]
        old = module._parameters.get(leaf)
        if old is not None:
            module._parameters[leaf] = nn.Parameter(old.detach().to("meta"), requires_grad=old.requires_grad)


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Put a tensor (parameter or buffer) under its state-dict name without a copy; returns what the model now holds."""
    module, leaf = _owner(model, name), name.rpartition(".")[2]
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return tensor
    old = module._parameters.get(leaf)
    if old is None:
        raise ModelError(
            f"{type(model).__name__} has no parameter {name!r}; check that weights and config.json belong together."
        )
    new = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
    module._parameters[leaf] = new
    return new


def _owner(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        raise ModelError(
            f"{type(model).__name__} has no parameter {name!r}; check that weights and config.json belong together."
        ) from None
