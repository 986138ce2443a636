"""Preset mixes as llama.cpp's: wider formats where experience says so, without looking at the model's numbers.

Roles are told from names: the value projection, the last linear layer of a block (down_proj), the attention's output,
the embedding, the output head. `more(i, n)` picks about half of the n blocks i: the first and last eighth, and every
third between. A role's k-quant is mapped to the item's option of the nearest bits per weight.

    Q2_K 2.625   Q3_K 3.4375   Q4_K 4.5   Q5_K 5.5   Q6_K 6.5625

Source: the tensor rules of llama.cpp's quantizer (reference code).
"""

import re
from typing import Any

import numpy as np

from lowbit.allocate._problem import Allocation, Array, Problem
from lowbit.allocate._spec import Spec
from lowbit.errors import RecipeError, near_names

BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
BASE = {"Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
BASE |= {"Q6_K": "Q6_K"}
ROLES = {
    "attn_v": r"(v_proj|value|attn_v)$",
    "attn_output": r"(o_proj|out_proj|attn_output|attention\.output\.dense)$",
    "ffn_down": r"(down_proj|fc2|ffn_down|mlp\.c_proj|(?<!attention\.)output\.dense)$",
    "output": r"(embed_tokens|wte|lm_head|embeddings|output)$",
}


def more(i: int, n: int) -> bool:
    """Whether block i of n is one of those that get more bits."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def quant_of(role: str, i: int, n: int, mix: str, gqa: int = 1) -> str:
    """The k-quant of a role in block i of n. gqa: query heads to a key-value head."""
    base = BASE[mix]
    if role == "output":
        return "Q6_K"
    if mix == "Q2_K":
        wide = "Q4_K" if gqa >= 4 else "Q3_K"
        return {"attn_v": wide, "ffn_down": "Q3_K", "attn_output": "Q3_K"}.get(role, base)
    if mix == "Q3_K_M":
        v = "Q5_K" if i < 2 else "Q4_K"
        return {"attn_v": v, "ffn_down": "Q5_K" if i < n // 16 else "Q4_K", "attn_output": "Q4_K"}.get(role, base)
    if mix == "Q4_K_S":
        early = (role == "ffn_down" and i < n // 8) or (role == "attn_v" and i < 4)
        return "Q5_K" if early else base
    if mix in ("Q4_K_M", "Q5_K_M") and role in ("attn_v", "ffn_down") and more(i, n):
        return "Q6_K"
    return base


def allocate(problem: Problem, measure: Any = None, rescore: Any = None, *, mix: str = "", gqa: int = 1) -> Allocation:
    """mix: one of BASE; "" takes the widest that keeps the limits.

    Needs columns "bytes" and "weights" (each item's count of weights, the same for all its options).
    Raises BudgetError where the mix does not fit, RecipeError for a mix that is not known.
    """
    if mix and mix not in BASE:
        raise RecipeError(f"unknown mix {mix!r}. {near_names(mix, list(BASE))}")
    problem.check()
    with np.errstate(invalid="ignore"):  # options that an item does not have
        bits = 8 * problem.columns["bytes"] / problem.columns["weights"]
    for name in [mix] if mix else sorted(BASE, key=list(BASE).index, reverse=True):
        choice = _choice(problem, bits, name, gqa)
        if problem.fits(choice):
            return problem.allocation(choice, mix=name)
    raise problem.unreachable()


def _choice(problem: Problem, bits: Array, mix: str, gqa: int) -> Any:
    places = [re.search(r"(?:^|\.)(\d+)\.", name) for name in problem.names]
    blocks = [int(m[1]) if m else 0 for m in places]
    n = max(blocks, default=0) + 1
    wanted = [BITS[quant_of(_role(name), i, n, mix, gqa)] for name, i in zip(problem.names, blocks)]
    with np.errstate(invalid="ignore"):
        distance = np.where(problem.allowed, np.abs(bits - np.array(wanted)[:, None]), np.inf)
    return distance.argmin(1)


def _role(name: str) -> str:
    return next((role for role, pattern in ROLES.items() if re.search(pattern, name)), "")


SPEC = Spec(
    "preset",
    "llama.cpp's mixes: wider formats by role and depth",
    "ggml-org/llama.cpp, tensor rules",
    allocate,
    "allocator",
    {"mix": "", "gqa": 1},
)
