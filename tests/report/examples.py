"""Manifests as a compression writes them, made up: a small language model and a convolutional network."""

import math
import random
from typing import Any

from lowbit.runtime.manifest import summarize

KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def row(
    shape: tuple[int, ...], fmt: str, code_bits: float, group: int, kind: str = "linear", **numbers: Any
) -> dict[str, Any]:
    n = math.prod(shape)
    sizes = {"codes": math.ceil(n * code_bits / 8), "scale": 2 * n // group}
    if fmt.startswith("uint"):
        sizes["zero"] = math.ceil(n / group * code_bits / 8)
    total = sum(sizes.values())
    return {
        "type": kind,
        "meta": {"shape": list(shape), "parts": [{"format": fmt}]},
        "bias": False,
        "bytes": total,
        "bits_per_weight": 8 * total / n,
        "tensors": {k: {"bytes": b, "sha256": "0" * 64} for k, b in sizes.items()},
        "error": None,
        "error_rtn": None,
        "sensitivity": None,
    } | numbers


def language_model(blocks: int = 30, sensitivity: bool = True) -> dict[str, Any]:
    draw = random.Random(0)
    layers = {"model.embed_tokens": row((49152, 576), "int8-g64", 8, 64, "embedding")}
    for b in range(blocks):
        for name, shape in KINDS.items():
            error = 0.03 + 0.05 * draw.random() + (0.06 if "down" in name and b in (1, blocks - 1) else 0) + 0.0006 * b
            numbers = {
                "error": error,
                "error_rtn": error * (1.4 + draw.random() / 3),
                "sensitivity": error**2 * 3 if sensitivity else None,
            }
            layers[f"model.layers.{b}.{name}"] = row(shape, "uint4-g64", 4, 64, **numbers)
    plain = {
        f"model.layers.{b}.{n}.weight": norm(576)
        for b in range(blocks)
        for n in ("input_layernorm", "post_attention_layernorm")
    }
    plain["model.norm.weight"] = norm(576)
    return manifest(layers, plain) | {"tied": {"lm_head": "model.embed_tokens"}}


def norm(n: int) -> dict[str, Any]:
    return {"shape": [n], "dtype": "F32", "bytes": 4 * n, "sha256": "0" * 64}


def manifest(layers: dict[str, Any], plain: dict[str, Any], kind: str = "transformers") -> dict[str, Any]:
    return {
        "format_version": 1,
        "lowbit_version": "0.1.0",
        "checksum": "0" * 64,
        "kind": kind,
        "auto_class": "AutoModelForCausalLM",
        "recipe": {
            "method": "gptq",
            "bits": 4,
            "group": 64,
            "data": "valid.txt[:50%]",
            "windows": 24,
            "context": 512,
            "seed": 0,
            "options": {"damping": 0.01},
        },
        "seed": 0,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "source": {
            "describe": "SmolLM2-135M-Instruct: Llama, 134.5 M weights, 538 MB as float, read from gguf",
            "fingerprint": "ab" * 16,
        },
        "layers": layers,
        "tied": {},
        "plain": plain,
        "summary": summarize(layers, plain),
        "files": {},
    }


RUN = {
    "seconds": 152.3,
    "peak_memory_bytes": 1_210_000_000,
    "machine": {"cpu": "Intel Xeon", "cores": 2, "system": "Linux 6.1"},
    "threads": 2,
    "evaluations": [
        {
            "text": "valid.txt[50%:]",
            "perplexity": 34.91,
            "float_perplexity": 30.02,
            "kl": 0.0712,
            "top1_agreement": 0.871,
            "windows": 40,
            "context": 512,
            "stride": 512,
            "protocol": "gptq",
            "activations": "float",
            "tokens_per_second": 312.4,
            "bytes": 83_000_000,
        }
    ],
}
