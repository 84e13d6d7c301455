"""Two processes on the CPU (gloo): the same gradients and parameters as one process on the joined batches."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_text import collate, rows, save_base, sums, write_jsonl
from trainers import adapted, assert_close, train

from adafuse import AdaFuseConfig
from adafuse.training import TrainSettings, run_training

STEPS = 3
CASES = {
    "language model alone": ({"aux_loss_coef": 0.0, "routing": "layer", "shared_rank": 2}, {}, "all"),
    "balance loss": ({"aux_loss_coef": 3.0}, {}, "all"),
    "router alone": ({"aux_loss_coef": 3.0, "top_k": 1, "router_hidden": 8}, {}, "router"),
    "checkpointing": ({"aux_loss_coef": 3.0, "routing": "layer"}, {"gradient_checkpointing": True}, "all"),
}


def trained(case, folder, **options):
    """(gradients of each step, parameters at the end) of one process."""
    config, arguments, only = CASES[case]
    model = adapted(**config)
    model.set_trainable(only)
    options = {"collate": collate, "per_device_train_batch_size": 2, "max_steps": STEPS, **arguments, **options}
    trainer = train(model, rows(16), folder, **options)
    gradients = [
        {n: g for n, g in step.items() if only == "all" or n.startswith("router.")} for step in trainer.gradients
    ]
    return gradients, {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}


def command(base, data, out, console, **settings):
    """`adafuse train` with a checkpoint on the way."""
    config = AdaFuseConfig(r=2, num_experts=4, aux_loss_coef=3.0)
    settings = TrainSettings(steps=4, batch_size=2, learning_rate=1e-2, save_every=2, **settings)
    result = run_training(base, data, out, config=config, settings=settings, console=console, device="cpu")
    return result.eval_loss


def worker(rank, port, folder):
    """What one of the two processes does: every case, then the command."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    found = {case: trained(case, folder / f"rank{rank}") for case in CASES}
    console = Console(file=(folder / f"printed{rank}").open("w"), quiet=rank > 0)
    found["command"] = command(folder / "base", folder / "data.jsonl", folder / "out", console)
    torch.save(found, folder / f"found{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, [what rank 0 found, what rank 1 found]). One start of two processes for all tests: starting is the slow part."""
    folder = tmp_path_factory.mktemp("ddp")
    save_base(folder / "base")
    write_jsonl(folder / "data.jsonl", sums(40))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["adafuse.training"])  # imported once for both
    torch.multiprocessing.start_processes(worker, (port, folder), nprocs=2, start_method="forkserver")
    return folder, [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_that_accumulates_their_batches(case, two, tmp_path):
    """The balance loss too: it is the mean over all micro-batches of all processes, weighted by their label tokens."""
    _, (first, second) = two
    assert all(torch.equal(second[case][1][name], tensor) for name, tensor in first[case][1].items())
    gradients, parameters = trained(case, tmp_path, gradient_accumulation_steps=2)
    assert len(first[case][0]) == STEPS
    for step, wanted in enumerate(gradients):
        assert all(gradient.norm() > 0 for gradient in wanted.values())
        # Adam's first steps divide by the gradient's size: differences of rounding grow with every step.
        assert_close(first[case][0][step], wanted, tolerance=1e-5 if step == 0 else 1e-2)
    assert_close(first[case][1], parameters, tolerance=1e-2)


def test_two_processes_equal_one_on_the_joined_batch(two, tmp_path):
    """Without the balance loss, which is not a sum over tokens, the joined batch may also be one micro-batch."""
    _, (first, _) = two
    case = "language model alone"
    gradients, _ = trained(case, tmp_path, per_device_train_batch_size=4)
    assert_close(first[case][0][0], gradients[0], tolerance=1e-5)


def test_the_command_in_two_processes_writes_once_and_the_same(two, tmp_path):
    folder, (first, second) = two
    wanted = command(folder / "base", folder / "data.jsonl", tmp_path / "out", Console(quiet=True), accumulation=2)
    assert first["command"] == second["command"] == pytest.approx(wanted, rel=1e-3)
    written = {path.name for path in Path(folder / "out").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "checkpoint-2", "checkpoint-4"}
    assert (folder / "printed0").read_text().count("adapter saved in") == 1
    assert (folder / "printed1").read_text() == ""
