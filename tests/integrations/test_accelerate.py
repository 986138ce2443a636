"""Two CPU processes, data-parallel through accelerate and fully sharded: they compute what one process does.

LSQ's input scale is left out: its gradient is divided by the root of the batch that one process sees.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize(("weights", "activations"), [("s3", "sign"), ("lsq", "pact"), ("bnn_pp", "float")])
def test_two_processes_train_resume_and_pack(how: str, weights: str, activations: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    if how == "fsdp" and not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("torch.distributed.fsdp.fully_shard came with torch 2.6")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*words, how, weights, activations, str(tmp_path / "state")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "ALL THE SAME" in done.stdout, done.stderr[-3000:]
