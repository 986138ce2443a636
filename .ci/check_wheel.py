"""Run by `make wheel` in an environment that holds the built wheel and nothing of the checkout."""

from pathlib import Path

import torch

import lowbit

here = Path(lowbit.__file__)
assert "site-packages" in here.parts, f"lowbit came from {here}, not from the wheel"
print(f"lowbit {lowbit.__version__} from the wheel, torch {torch.__version__}")
