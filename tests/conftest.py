"""What every test gets: no network, a fixed seed, no GPU tests where there is no GPU."""

import os

# Before transformers is imported: a test that reaches for the network must fail, not wait.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import interpreter
import pytest
import torch

# Tests run side by side, as many as pytest-xdist has workers: each takes its share of the cores.
if "OMP_NUM_THREADS" not in os.environ:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # kernels run in Triton's interpreter; it is asked when they are defined
    interpreter.make_fast()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def few_programs(monkeypatch):
    """For whole models in the interpreter, whose time is that of programs: those of `decode` that compute h take 8 ranks each, not one."""
    if not torch.cuda.is_available():
        interpreter.take_ranks(8, monkeypatch.setattr)
