"""Quantize: the weight function that rounds to a format in the forward pass and lets the gradient through.

    w_hat = scale * P(T(x))
    dL/dw = dL/dw_hat * dx/dw * scale * T'(x)
    dL/dscale = sum dL/dw_hat (level - x T'(x)) / sqrt(n Q)      where the scale is learned (LSQ; Q the last level)

What x is says option `unit`: "step", x = w / scale, so that dL/dw = dL/dw_hat T'(x); "raw", x = w, so that dL/dw =
dL/dw_hat scale T'(w); "window", x = w without the factor scale, where T only says which weights learn (the code of
XNOR-Net and Bi-Real Net). The scale is, by option `scale`,

    "fit"        the format's rule on the present w, in every forward pass; a constant in the backward pass
    "attached"   the same, and the gradient also flows through mean|w| (ReSTE, the full gradient of XNOR-Net)
    "learned"    a parameter a block, started at the least-squares scale (LSQ, BiT's elastic binarization)
    "initial"    fitted once, when it is attached
    "unit"       1 (BinaryConnect, BNN)

`forward="soft"` computes with scale * T(x) while training and with levels in evaluation (BNN++, BiPer's first stage).
Rules that search (search, lstsq, kmeans) are fitted again every `refit` steps instead of in every forward pass.

Sources: Courbariaux 2015 (arXiv:1511.00363), Rastegari 2016 (arXiv:1603.05279), Esser 2020 (arXiv:1902.08153).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import FormatError, RecipeError, near_names
from lowbit.estimators import Estimator, scaled, through
from lowbit.estimators import estimator as find_estimator
from lowbit.estimators._project import code_of, project
from lowbit.formats import Format, Grid, decode, encode, fit
from lowbit.formats.tensor import matrix_shape
from lowbit.weights._function import TINY, WeightFunction, WeightSpec, as_matrix, stored

UNITS = ("step", "raw", "window")
SCALES = ("fit", "attached", "learned", "initial", "unit")
SLOW_RULES = ("search", "lstsq", "kmeans")
REFIT = 50  # steps between two fits of a rule that searches


class Quantize(WeightFunction):
    """Parametrization for `torch.nn.utils.parametrize.register_parametrization(layer, "weight", Quantize("ternary"))`.

    fmt:       a format or its string; blocks are those of the weight seen as (out, everything else)
    estimator: its name, {"name": ..., option: ...}, or an Estimator
    scale, forward: see above
    unit:      "step", "raw" or "window"; empty: as the estimator says
    clip:      the latent weights are kept in [-clip, clip] after every step; 0: they are not
    refit:     steps between fits of the grid; 0: in every forward pass
    w:         the weight it will be put on; needed where the scale outlives a forward pass
    """

    steps_done: Tensor

    def __init__(
        self,
        fmt: "Format | str" = "binary-channel",
        estimator: "str | dict[str, Any] | Estimator" = "identity",
        scale: str = "fit",
        forward: str = "hard",
        unit: str = "",
        clip: float = 0.0,
        refit: int = 0,
        w: "Tensor | None" = None,
    ):
        self_format = fmt if isinstance(fmt, Format) else Format.parse(fmt)
        est = find_estimator(estimator).over(self_format.levels)
        super().__init__(est.schedule, est.start)
        self.format, self.estimator = self_format, est
        self.scale_kind, self.soft, self.unit, self.clip = scale, forward == "soft", unit or est.unit, clip
        self.refit = refit
        _check(self, scale, forward)
        self._start(scale, w)

    def _start(self, scale: str, w: "Tensor | None") -> None:
        """What outlives a forward pass: a learned scale, or a grid that is kept."""
        self.register_parameter("scale", None)
        keep = scale == "initial" or self.refit > 0
        if scale != "learned" and not keep:
            return
        if w is None:
            raise RecipeError(f'scale="{scale}" starts from the weight: give w=layer.weight.')
        blocks = self.format.blocks.split(as_matrix(w.detach()))
        if scale == "learned":
            self.scale = nn.Parameter(fit(blocks, _started(self.format)).scale)
            return
        for name, member in zip(Grid._fields, self._fitted(blocks)):
            self.register_buffer(f"grid_{name}", member)
        if self.refit:
            self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))

    def forward(self, w: Tensor) -> Tensor:
        """w (out, ...) -> w_hat of the same shape and dtype."""
        if self.scale_kind in ("learned", "attached"):
            return self._with_scale(w)
        with torch.no_grad():
            w_hat, slope = self._constant(w.detach())
        return through(w, w_hat, slope)

    def encoded(self, latent: Tensor) -> tuple[Tensor, Grid, Format]:
        matrix = as_matrix(latent)
        blocks = self.format.blocks.split(matrix)
        grid = self._grid(blocks)
        if self._is_plain():
            codes = code_of(self._level(blocks, grid.scale, hard=True), self.format.levels)
        else:
            codes = encode(blocks, grid, self.format)
        return self.format.blocks.merge(codes, *matrix.shape), grid, self.format

    def in_steps(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """x and T(x) in the weight's shape: how far the estimator is from the levels it stands for."""
        with torch.no_grad():
            matrix = as_matrix(latent)
            blocks = self.format.blocks.split(matrix)
            x = self._x(blocks, self._grid(blocks).scale)
            both = (x, self.estimator.transform(x, self.t))
        x, t = (self.format.blocks.merge(v, *matrix.shape).reshape(latent.shape) for v in both)
        return x, t

    @torch.no_grad()
    def after_step(self, latent: Tensor) -> None:
        if self.clip:
            latent.clamp_(-self.clip, self.clip)
        if self.refit:
            self.steps_done += 1
            if int(self.steps_done) % self.refit == 0:
                blocks = self.format.blocks.split(as_matrix(latent))
                for name, member in zip(Grid._fields, self._fitted(blocks)):
                    if member is not None:
                        getattr(self, f"grid_{name}").copy_(member)

    # ------------------------------------------------------------ the parts

    def _is_plain(self) -> bool:
        """levels * scale, without zeros, tables, and scales that depend on each other."""
        return self.format.zero == "none" and bool(self.format.levels.values) and self.format.scale_dtype != "double"

    def _fitted(self, blocks: Tensor) -> Grid:
        """The grid of the present weights in the precision a file keeps (scales come so from `fit`)."""
        grid, fmt = fit(blocks, self.format), self.format
        zero = grid.zero.half().float() if grid.zero is not None and fmt.zero == "real" else grid.zero
        return Grid(grid.scale, zero, None if grid.table is None else grid.table.half().float())

    def _grid(self, blocks: Tensor) -> Grid:
        if self.scale_kind == "unit":
            return Grid(blocks.new_ones(len(blocks), 1))
        if self.scale_kind == "learned":
            return Grid(self._stored_scale())
        if "grid_scale" in self._buffers:
            return Grid(*(self._buffers[f"grid_{name}"] for name in Grid._fields))  # type: ignore[arg-type]
        return self._fitted(blocks)

    def _stored_scale(self) -> Tensor:
        assert self.scale is not None
        return stored(self.scale.detach().float().clamp(min=TINY), self.format.scale_dtype)

    def _x(self, blocks: Tensor, scale: Tensor) -> Tensor:
        return blocks / scale.clamp(min=TINY) if self.unit == "step" else blocks

    def _slope(self, x: Tensor, scale: Tensor) -> Tensor:
        """d w_hat / d w."""
        slope = self.estimator.slope(x, self.t)
        return slope * scale if self.unit == "raw" else slope

    def _level(self, blocks: Tensor, scale: Tensor, hard: bool, x: "Tensor | None" = None) -> Tensor:
        """P(T(x)), or T(x) in a soft forward pass; blocks (n, size), scale (n, 1)."""
        est, levels = self.estimator, self.format.levels
        if not hard or est.periodic:
            value = est.transform(self._x(blocks, scale) if x is None else x, self.t)
            return project(value, levels) if hard else value
        if levels.values == (-1.0, 1.0):
            return project(blocks, levels)
        in_steps = x if x is not None and self.unit == "step" else blocks / torch.where(scale > 0, scale, 1.0)
        return project(in_steps, levels, self.format.rounding)

    def _constant(self, w: Tensor) -> tuple[Tensor, "Tensor | None"]:
        """w_hat and T'(x) with a scale that takes no gradient."""
        matrix, fmt, est = as_matrix(w), self.format, self.estimator
        blocks = fmt.blocks.split(matrix)
        grid = self._grid(blocks)
        identity = est.name == "identity" and self.unit != "raw"
        x = None if identity and not self.soft else self._x(blocks, grid.scale)
        if self._is_plain():
            w_hat = self._level(blocks, grid.scale, not (self.soft and self.training), x).mul_(grid.scale)
        elif fmt.scale_dtype == "double":  # its scales move once more when they are stored
            w_hat = fmt.blocks.split(self.quantized(w).dequantize().reshape(matrix.shape))
        else:
            w_hat = decode(encode(blocks, grid, fmt), grid, fmt)
        slope = None if identity or x is None else self._slope(x, grid.scale)
        w_hat = fmt.blocks.merge(w_hat, *matrix.shape).reshape(w.shape)
        return w_hat, None if slope is None else fmt.blocks.merge(slope, *matrix.shape).reshape(w.shape).to(w.dtype)

    def _with_scale(self, w: Tensor) -> Tensor:
        """w_hat with a gradient to the scale as well."""
        fmt, est = self.format, self.estimator
        out, in_ = matrix_shape(tuple(w.shape))
        blocks = fmt.blocks.split(w.float().reshape(out, in_))
        source = blocks.abs().mean(1, keepdim=True) if self.scale_kind == "attached" else self.scale
        assert source is not None
        with torch.no_grad():
            value, scale = blocks.detach(), stored(source.detach().float().clamp(min=TINY), fmt.scale_dtype)
            x = self._x(value, scale)
            level = self._level(value, scale, not (self.soft and self.training), x)
            slope = self._slope(x, scale)
            to_scale = est.scale_slope(x, level, slope) if self.unit == "step" else level
            if self.scale_kind == "learned":
                to_scale = to_scale / (value.shape[1] * fmt.levels.values[-1]) ** 0.5
        y = scaled(blocks, through(source, scale), level, slope, to_scale)
        return fmt.blocks.merge(y, out, in_).reshape(w.shape).to(w.dtype)

    def extra_repr(self) -> str:
        return f"{str(self.format)!r}, estimator={self.estimator.name!r}, scale={self.scale_kind!r}"


def _started(fmt: Format) -> Format:
    """Where a learned scale starts: least squares; for two levels that is the mean."""
    return fmt.with_(scale_rule="mean" if fmt.levels.values == (-1.0, 1.0) else "lstsq")


def _check(q: Quantize, scale: str, forward: str) -> None:
    fmt = q.format
    if fmt.rounding == "stochastic":
        raise FormatError(f"{fmt}: stochastic rounding gives another weight on every call. Use ties to even.")
    for value, known, what in (
        (scale, SCALES, "scale"),
        (forward, ("hard", "soft"), "forward"),
        (q.unit, UNITS, "unit"),
    ):
        if value not in known:
            raise RecipeError(f"unknown {what} {value!r}. {near_names(str(value), known)}")
    if scale != "fit" and not q._is_plain():
        raise FormatError(
            f'{fmt}: scale="{scale}" needs a format of levels times one scale a block. Use int, binary, ternary, pot '
            'or minifloat levels without a zero, or scale="fit".'
        )
    if scale == "attached" and fmt.scale_rule != "mean":
        raise FormatError(f'{fmt}: only mean|w| takes a gradient (scale="attached"). Use binary or ternary-...-mean.')
    if q.soft and q.estimator.fits != "sign":
        raise RecipeError(
            f'forward="soft" computes with T(x), which estimator {q.estimator.name!r} leaves as it is. '
            'Use an estimator that turns into the sign, such as "swishsign", or forward="hard".'
        )


def build(w: Tensor, **options: Any) -> Quantize:
    """For `prepare`: rules that search are fitted every 50 steps."""
    fmt = options.pop("format", "binary-channel")
    fmt = fmt if isinstance(fmt, Format) else Format.parse(fmt)
    if fmt.scale_rule in SLOW_RULES and options.get("scale", "fit") == "fit":
        options.setdefault("refit", REFIT)
    return Quantize(fmt, **options, w=w)


OPTIONS = {
    "format": "binary-channel",
    "estimator": "identity",
    "scale": "fit",
    "forward": "hard",
    "unit": "",
    "clip": 0.0,
    "refit": 0,
}
SPEC = WeightSpec("quantize", "rounding to any format, any estimator", "arXiv:1511.00363", build, OPTIONS)
