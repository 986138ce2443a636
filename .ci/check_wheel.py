"""Pack a layer, run it, save it, load it: by `make wheel`, where the built wheel is and nothing of the checkout."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lowbit
from lowbit.runtime import active_isa

here = Path(lowbit.__file__)
assert "site-packages" in here.parts, f"lowbit came from {here}, not from the wheel"

torch.manual_seed(0)
net, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(5, 64)
lowbit.prepare(net, "uint4-g32", keep_ends=False)
trained = net(x)
net = lowbit.pack(net)
assert torch.allclose(net(x), trained, atol=1e-4), "the packed network computes something else"

with tempfile.TemporaryDirectory() as folder:
    lowbit.save(net, f"{folder}/out")
    again = lowbit.load(f"{folder}/out", model=nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)))
    assert torch.equal(again(x), net(x)), "the loaded network computes something else"

bits = lowbit.bits_per_weight(net)
print(f"lowbit {lowbit.__version__} from the wheel, torch {torch.__version__}: {bits:.3f} bits, ran on {active_isa()}")
