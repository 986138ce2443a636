"""PB-LLM: a small fraction of salient weights in 8 bits, the others binarized.

    saliency  w^2 / U_jj^2;  the `salient` largest of the whole matrix keep 8 bits, min-max of the row
    others    mu + a sign(w - mu),  mu = mean, a = mean |w - mu|, over the row's (or group's) binarized weights

The mask is fixed before the column loop, which then feeds all errors forward.
Bits: 1 + 8 * salient + the mask (gap codes or a bitmap) + 32 / group + 24 / in.
Source: Shang 2023 (PB-LLM, arXiv:2310.00034) and the authors' code, which takes the means over all columns with the
salient ones as zeros and so finds both too small; here they are left out, as the paper says.
"""

from torch import Tensor

from lowbit.errors import FormatError, RecipeError
from lowbit.formats import Format, fit
from lowbit.solvers._spec import Solution, Spec
from lowbit.solvers._split import Split, fit_masked, row_importance, saliency, solve_split, top
from lowbit.statistics import LayerStatistics, drift_target

SALIENT_FORMAT = Format.parse("uint8-channel")


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    salient: float = 0.1,
    damping: float = 0.01,
    drift: bool = True,
) -> Solution:
    """Quantize w (out, in). Raises RecipeError without statistics."""
    if statistics is None:
        raise RecipeError("pb_llm needs calibration text: add --data FILE, or use --method adpq.")
    if fmt.levels.name != "binary" or fmt.blocks.rows != 1:
        raise FormatError(f"pb_llm binarizes what is not salient: use binary-channel-zreal or with groups, not {fmt}.")
    w = drift_target(w, statistics) if drift else w
    gram = statistics.gram.clone()
    gram.diagonal()[statistics.dead] = 1.0
    score = saliency(w, gram, damping).reshape(1, -1)
    mask = top(score, min(round(salient * w.numel()), w.numel())).reshape(w.shape)

    def make(importance: "Tensor | None") -> Split:
        blocks, ones = SALIENT_FORMAT.blocks, row_importance(None, w)
        high = fit(blocks.split(w), SALIENT_FORMAT)
        return Split(mask, fmt, fit_masked(w, ~mask, fmt, ones), SALIENT_FORMAT, high)

    return solve_split(w, make, statistics, damping=damping, refitted=False)


SPEC = Spec(
    name="pb_llm",
    title="PB-LLM: salient weights in 8 bits, the others binarized",
    source="Shang 2023, arXiv:2310.00034",
    solve=solve,
    uses_gram=True,
    format="binary-{blocks}-zreal",
    needs_data=True,
    options={"salient": 0.1, "damping": 0.01, "drift": True},
    bits=1,
    widths=(1,),
    group=-1,
)
