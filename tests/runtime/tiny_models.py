"""Tiny models with random weights, and the shortest way to pack one: round to nearest, layer by layer."""

from typing import Any

import torch
from torch import nn

from lowbit.formats import Format, quantize
from lowbit.runtime import swap
from lowbit.runtime.skeleton import dtype_word

IDS = torch.arange(3, 15)[None]


def llama(tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, **{dtype_word(): dtype})


def gpt2() -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def bert() -> Any:
    from transformers import AutoModelForMaskedLM, BertConfig

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    return AutoModelForMaskedLM.from_config(config)


MODELS = {"llama": llama, "llama_untied": lambda: llama(tied=False), "gpt2": gpt2, "bert": bert}


def convnet() -> nn.Sequential:
    """1x8x8 images -> 4 classes; a strided and a grouped convolution, a norm with buffers."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=2),
        nn.Flatten(),
        nn.Linear(128, 4),
    )


def pack_model(model: Any, fmt: str = "uint4-g16", embedding: str = "int8-g16", activations: str = "float") -> Any:
    """Every linear, embedding and convolution rounded to nearest and packed in place; a shared weight stays shared."""
    done: dict[int, Any] = {}
    for name, module in list(model.named_modules()):
        if kind := swap.kind_of(module):
            w = module.weight.detach()
            if id(module.weight) not in done:
                done[id(module.weight)] = module.weight, _quantize(w.T if kind == "conv1d" else w, kind, fmt, embedding)
            conv = swap.conv_options(module) if kind == "conv2d" else None
            new = swap.pack_layer(module, done[id(module.weight)][1], kind, activations, conv)
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._modules[leaf] = new
    return model.eval()


def _quantize(w: torch.Tensor, kind: str, fmt: str, embedding: str) -> Any:
    word = embedding if kind == "embedding" else fmt
    fits = Format.parse(word) if w[0].numel() % 16 == 0 else Format.parse(word.replace("g16", "channel"))
    return quantize(w.contiguous(), fits)


def packed(name: str, **options: Any) -> Any:
    """One of MODELS, seeded and packed."""
    torch.manual_seed(0)
    return pack_model(MODELS[name](), **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def files_of(folder: Any) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
