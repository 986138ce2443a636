"""The rows of the compression table: name -> recipe. One method and width a row, with the method's usual options.

A row with a "goal" is what is typed on the command line, not a recipe: formats are chosen on the way.
"""

from typing import Any

Row = dict[str, Any]


def rows() -> dict[str, Row]:
    """All rows, the baselines first."""
    found: dict[str, Row] = {"float": {"method": "rtn", "format": "float", "embeddings": 16}}
    for method in ("rtn", "hqq", "awq", "gptq"):
        found |= {f"{method}-{b}": {"method": method, "bits": b, "group": 64} for b in (4, 3, 2)}
    plain = {"damping": 0.01, "drift": False, "sweeps": 0}
    found |= {f"gptq-plain-{b}": {"method": "gptq", "bits": b, "options": plain} for b in (4, 3, 2)}
    found |= {f"icquant-{b}": {"method": "icquant", "bits": b} for b in (4, 3, 2)}
    for g in (1, 2, 8, 12):
        found[f"icquant-2-{g}%"] = {"method": "icquant", "bits": 2, "options": {"gamma": g / 100}}
    paper = {"method": "icquant", "options": {"feedback": False}}
    found |= {f"icquant-sk-{b}": paper | {"format": f"kmeans{b}-channel", "gram": "fisher"} for b in (4, 3, 2)}
    found |= {f"icquant-rtn-{b}": paper | {"format": f"uint{b}-channel"} for b in (4, 3, 2)}
    found |= {f"spqr-{b}": {"method": "spqr", "bits": b} for b in (4, 3, 2)}
    found["spqr-2-tau2"] = {"method": "spqr", "bits": 2, "options": {"tau": 2.0}}
    found["billm"] = {"method": "billm", "format": "kmeans2-g192"}
    found |= {f"pb_llm-{s}%": {"method": "pb_llm", "options": {"salient": s / 100}} for s in (5, 10, 20)}
    found |= {f"adpq-{b}": {"method": "adpq", "bits": b, "group": 64} for b in (4, 3, 2)}
    found |= {f"precalibration-{b}": {"method": "precalibration", "bits": b, "group": 64} for b in (3, 2)}
    found |= {f"potptq-{b}": {"method": "potptq", "format": f"pot{b}nz-g64"} for b in (4, 3, 2)}
    found["db_llm"] = {"method": "db_llm", "group": 64}
    for gram in ("oac", "guided"):
        found |= {f"gptq-{b}-{gram}": {"method": "gptq", "bits": b, "gram": gram} for b in (3, 2)}
        found[f"spqr-2-{gram}"] = {"method": "spqr", "bits": 2, "options": {"tau": 2.0}, "gram": gram}
        found[f"billm-{gram}"] = {"method": "billm", "format": "kmeans2-g192", "gram": gram}
    found |= {f"learned-{b}": {"method": "learned", "bits": b} for b in (4, 3, 2)}
    found["scalebits-layers-alike"] = {"method": "scalebits", "options": {"average": 2.21}}
    goal = {"method": "gptq", "bits": 2.5}
    found |= {f"{a}-2.5": {"goal": goal | {"allocate": a}} for a in ("greedy", "integer_program")}
    found["preset-2.7"] = {"goal": goal | {"bits": 2.7, "allocate": "preset"}}
    found["hawq-2.5"] = {"goal": goal | {"allocate": "integer_program", "sensitivity": "trace"}}
    found["scalebits-2.5"] = {"goal": {"method": "scalebits", "bits": 2.5}}
    return found
