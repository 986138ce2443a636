"""Llama-like decoders as one C++ loop: no interpreter between the products, a key-value cache of its own.

    decoder = NativeDecoder(model)                       a transformers model in memory, its layers packed or not
    cache = decoder.cache(sequences=1, capacity=200)
    logits = decoder.forward(cache, ids, [0] * len(ids), wanted=[len(ids) - 1])       reads a prompt
    logits = decoder.forward(cache, [token], [0], wanted=[0])                         reads one token more

Covered are transformers' Llama, Mistral and Qwen2 causal models on the CPU, with or without biases, tied heads, grouped
key-value heads, sliding windows and static rotary scalings; linear layers may be packed (float or int8 activations) or
plain. The loop computes in float32. `why_not` says what stands in the way of another model. Weights are borrowed from
the model, not copied; a decoder is built in milliseconds and does not see later changes of the model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ModelError, RecipeError
from lowbit.runtime import kernels
from lowbit.runtime.layers import PackedEmbedding, PackedLinear
from lowbit.runtime.slabs import Slabs

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
STATIC_ROPES = ("default", "linear", "llama3", "yarn")  # rotary frequencies that do not depend on the length
KV_BITS = (32, 8)
PRODUCTS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def why_not(model: Any) -> "str | None":
    """What keeps the native loop from running this model, in a few words; None where it can."""
    if type(model).__name__ not in CLASSES or not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is not one of {', '.join(CLASSES)}"
    config, rotary = model.config, model.model.rotary_emb
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act is {config.hidden_act}, not silu"
    if getattr(rotary, "rope_type", None) not in STATIC_ROPES:
        return f"rotary positions of type {getattr(rotary, 'rope_type', 'unknown')} depend on the length"
    for name, module in model.named_modules():
        if reason := _module_reason(module):
            return f"{name or 'the model'} {reason}"
    if 2 * rotary.inv_freq.numel() != model.model.layers[0].self_attn.head_dim:
        return "only a part of each head is rotated"
    return None


def _module_reason(module: nn.Module) -> "str | None":
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    tensor = next((t for t in (*module.parameters(False), *module.buffers(False))), None)
    if tensor is not None and tensor.device.type != "cpu":
        return f"is on {tensor.device.type}, not on the CPU"
    known = (PackedLinear, PackedEmbedding, nn.Linear, nn.Embedding)
    kind = next((c for c in known if isinstance(module, c)), None)
    if kind is not None and type(module) is not kind:
        return f"is a {type(module).__name__}"
    if isinstance(module, (PackedLinear, PackedEmbedding)) and isinstance(module.prepare().weight, Slabs):
        return "has a table for every group of columns"
    if kind is None and tensor is not None and not type(module).__module__.startswith("transformers."):
        return f"is a {type(module).__name__}"
    return None


class NativeDecoder:
    """The loop over one model's weights. Raises ModelError where `why_not` has a reason, and what `prepare` raises."""

    def __init__(self, model: Any) -> None:
        if reason := why_not(model):
            raise ModelError(
                f"the native decoder cannot run this model: {reason}. Leave it to the model's own forward."
            )
        config, body = model.config, model.model
        attention = body.layers[0].self_attn
        self.vocabulary = _rows(body.embed_tokens)
        self.isa = kernels.active_isa()
        self._decoder = kernels._extension().Decoder(
            len(body.layers), self.vocabulary, config.hidden_size, config.num_attention_heads,
            config.num_key_value_heads, attention.head_dim, config.intermediate_size, config.rms_norm_eps,
            attention.scaling, body.rotary_emb.attention_scaling, _floats(body.norm.weight),
            _floats(body.rotary_emb.inv_freq),
        )  # fmt: skip
        self._put(-1, "embedding", body.embed_tokens)
        self._put(-1, "head", model.lm_head)
        for i, layer in enumerate(body.layers):
            norms = (_floats(n.weight) for n in (layer.input_layernorm, layer.post_attention_layernorm))
            self._decoder.set_layer(i, *norms, _window(config, i))
            for name, path in PRODUCTS.items():
                self._put(i, name, layer.get_submodule(path))

    def cache(self, sequences: int, capacity: int, kv_bits: int = 32) -> Any:
        """Room for `sequences` texts of up to `capacity` tokens each.

        kv_bits: 32 is exact; 8 rounds each key and value vector to int8 with one scale.
        """
        if kv_bits not in KV_BITS:
            raise RecipeError(f"kv_bits={kv_bits} is unknown. Use 32 (exact) or 8.")
        return self._decoder.new_cache(sequences, max(capacity, 1), kv_bits == 8)

    def forward(self, cache: Any, ids: Sequence[int], sequence: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Read `ids`; row i comes next in text sequence[i]. Returns logits (len(wanted), vocabulary) of those rows.

        Raises IndexError on an unknown token, ValueError on a full cache.
        """
        logits = torch.empty(len(wanted), self.vocabulary, dtype=torch.float32, device="cpu")
        rows = (torch.tensor(v, dtype=torch.int64, device="cpu").numpy() for v in (ids, sequence, wanted))
        self._decoder.forward(cache, *rows, logits.numpy(), torch.get_num_threads(), self.isa)
        return logits

    def _put(self, layer: int, name: str, module: Any) -> None:
        bias = getattr(module, "bias", None)
        bias = None if bias is None else _floats(bias)
        if not isinstance(module, (PackedLinear, PackedEmbedding)):
            self._decoder.set_dense(layer, name, _floats(module.weight), bias)
            return
        prepared = module.prepare()
        assert not isinstance(prepared.weight, Slabs)
        int8 = module.activations == "int8" and name != "embedding"
        if int8:
            (weight,) = prepared.int8
            assert not isinstance(weight, Slabs)
            self._decoder.set_int8(layer, name, weight.packed.numpy(), bias)
        else:
            *arrays, bits = prepared.weight
            self._decoder.set_float(layer, name, *(t.numpy() for t in arrays), bits, module.shape[1], bias)
        if (added := prepared.sparse_int8 if int8 else prepared.sparse) is not None:
            self._decoder.set_exceptions(layer, name, *(t.numpy() for t in added))


def _rows(embedding: Any) -> int:
    return int(embedding.num_embeddings)


def _floats(t: Tensor) -> Any:
    return t.detach().float().contiguous().numpy()


def _window(config: Any, layer: int) -> int:
    """Tokens a layer sees, the own one included; 0 for all."""
    window = getattr(config, "sliding_window", None) or 0
    types = getattr(config, "layer_types", None)
    if types:
        return window if types[layer] == "sliding_attention" else 0
    if config.model_type == "qwen2":
        return window if config.use_sliding_window and layer >= config.max_window_layers else 0
    return window if config.model_type == "mistral" else 0
