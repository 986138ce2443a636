"""What people would use instead: torch in fp32 and bf16, ONNX Runtime's MatMulNBits, llama.cpp. Each if installed."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Call = Callable[[], object]
ORT_BITS = (2, 4, 8)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def torch_calls(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> list[Call]:
    """F.linear on each weight."""
    return [partial(F.linear, x, w) for x, w in zip(xs, ws)]


def onnxruntime_calls(x: Tensor, w: Tensor, bits: int, group: int, copies: int, threads: int) -> list[Call]:
    """MatMulNBits with int8 activations (accuracy level 4); one session a copy. [] where it is not available."""
    if (
        bits not in ORT_BITS
        or group < 16
        or group & (group - 1)
        or not (installed("onnxruntime") and installed("onnx"))
    ):
        return []
    import onnxruntime as ort

    model, options = _matmul_n_bits(w, bits, group), ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    feed = {"a": x.numpy()}
    try:
        sessions = [ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(copies)]
        sessions[0].run(None, feed)
    except Exception:  # this version lacks the operator for this width
        return []
    return [partial(s.run, None, feed) for s in sessions]


def _matmul_n_bits(w: Tensor, bits: int, group: int) -> bytes:
    """An ONNX model of one MatMulNBits: unsigned codes around 2**(bits-1), one scale for each group of a row."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    n, k = w.shape
    blocks = w.reshape(n, k // group, group)
    scale = blocks.abs().amax(-1).clamp(min=1e-8) / (2 ** (bits - 1))
    codes = (blocks / scale[..., None]).round().add(2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8)
    per_byte = 8 // bits
    places = torch.arange(per_byte, dtype=torch.uint8) * bits
    packed = (codes.reshape(n, k // group, -1, per_byte) << places).sum(-1, dtype=torch.uint8)
    node = helper.make_node("MatMulNBits", ["a", "b", "scale"], ["y"], domain="com.microsoft", K=k, N=n, bits=bits,
                            block_size=group, accuracy_level=4)  # fmt: skip
    held = [
        numpy_helper.from_array(packed.numpy(), "b"),
        numpy_helper.from_array(np.ascontiguousarray(scale.reshape(-1).numpy()), "scale"),
    ]
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name, size in (("a", k), ("y", n))]
    graph = helper.make_graph([node], "product", io[:1], io[1:], held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


class Llama:
    """llama.cpp through llama-cpp-python, on one GGUF file."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        from llama_cpp import Llama as Model

        self.model: Any = Model(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )

    def prefill(self, ids: Sequence[int]) -> None:
        self.model.reset()
        self.model.eval(list(ids))

    def decode(self, tokens: int) -> None:
        for i in range(tokens):
            self.model.eval([100 + i])
