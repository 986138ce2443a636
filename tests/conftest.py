"""What every test shares: fixed seeds, few threads, no network, and the optional real models and data.

The real models and texts are not part of the repository. The fixture `assets` gives their folder
(LOWBIT_ASSETS, by default `../shared` beside the checkout) and skips the test where there is none.
"""

import os
import random
from pathlib import Path

# before transformers or datasets are imported: a test that would go to the network fails at once instead
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: threads that wait do not spin

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # two processes of two threads would wait for each other

# the same examples on every run, and no time limit per example: a busy machine is not a bug
settings.register_profile("lowbit", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lowbit")


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed writes down the whole stack for GPUs: 3 ms a test
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder with the real models and texts; the test is skipped where it is absent."""
    folder = Path(os.environ.get("LOWBIT_ASSETS", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no models in {folder}: set LOWBIT_ASSETS to the folder that holds models/ and data/")
    return folder
