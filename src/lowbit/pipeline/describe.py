"""What is written down about a solved layer: its row in lowbit.json, its tensors' names, its errors."""

import torch
from torch import Tensor

from lowbit.formats import Format, QuantizedTensor, decode, encode, fit
from lowbit.formats.stores import BILEVEL
from lowbit.pipeline.checkpoint import Entries
from lowbit.statistics import LayerStatistics, output_energy, output_error


def layer_errors(w: Tensor, w_hat: Tensor, fmt: Format, statistics: "LayerStatistics | None") -> Entries:
    """error: relative error of the outputs (of the weights without statistics); error_rtn: the same of plain rounding;
    sensitivity: how much the inputs amplify a unit of relative weight noise, mean(diag H) |W|^2 / tr(W H W^T)."""
    blocks = fmt.blocks.split(w.float())
    plain_fmt = (
        fmt if not fmt.levels.values else fmt.with_(scale_rule=Format(fmt.levels, fmt.blocks, zero=fmt.zero).scale_rule)
    )
    if fmt.scale_dtype == BILEVEL:
        plain_fmt = plain_fmt.with_(scale_dtype="fp16")
    rtn = fmt.blocks.merge(_rounded(blocks, plain_fmt), *w.shape)
    if statistics is None:
        energy = max(float(w.float().square().sum(dtype=torch.float64)), 1e-30)
        errors = [float((x - w).square().sum(dtype=torch.float64)) / energy for x in (w_hat, rtn)]
        return {"error": errors[0], "error_rtn": errors[1], "error_of": "weight", "sensitivity": None}
    energy = max(output_energy(w, statistics.gram), 1e-30)
    errors = [output_error(w, x, statistics.gram) / energy for x in (w_hat, rtn)]
    noise = float(statistics.gram.diagonal().mean() * w.float().square().sum()) / energy
    return {"error": errors[0], "error_rtn": errors[1], "error_of": "output", "sensitivity": noise}


def _rounded(blocks: Tensor, fmt: Format) -> Tensor:
    grid = fit(blocks, fmt)
    return decode(encode(blocks, grid, fmt), grid, fmt)


def layer_entry(kind: str, q: QuantizedTensor, bias: bool) -> Entries:
    return {
        "type": kind,
        "meta": q.meta(),
        "bias": bias,
        "bytes": q.nbytes,
        "bits_per_weight": q.bits_per_weight,
        "error": None,
        "error_rtn": None,
        "sensitivity": None,
    }


def layer_tensors(name: str, q: QuantizedTensor) -> dict[str, Tensor]:
    return {f"{name}.{k}": t for k, t in q.tensors().items()}
