"""What only a GPU can show of the baselines: no host synchronisation, CUDA graphs, the same numbers as on a CPU."""

import pytest
import torch
from baseline_methods import ALL, METHODS
from families import VOCAB, batch
from gpus import no_host_sync
from reference import relative_error

from adafuse.engine.graph import captured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def given(seq, dtype):
    """Ids, and a ready 4-D mask: transformers waits for the device to find out whether a 2-D one, or none, means packed sequences."""
    causal = torch.full((seq, seq), float("-inf")).triu(1).to("cuda", dtype).expand(1, 1, seq, seq)
    ids = torch.randint(0, VOCAB, (1, seq), device="cuda")
    positions = torch.arange(seq, device="cuda")[None]
    return {"input_ids": ids, "attention_mask": causal, "position_ids": positions, "use_cache": False}


def graph_executions(method):
    return [each for each in getattr(ALL[method].model, "executions", ("reference", "fused")) if each != "published"]


@torch.no_grad()
@pytest.mark.parametrize("method", ALL)
def test_forwards_do_not_wait_for_the_device(method):
    model = ALL[method].attach()[0].to("cuda", torch.bfloat16)
    inputs = given(16, torch.bfloat16)
    for execution in graph_executions(method):
        model.execution = execution
        model(**inputs)
        with no_host_sync():
            model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("seq", [1, 16])
@pytest.mark.parametrize("method", ALL)
def test_a_cuda_graph_equals_eager(method, seq):
    model = ALL[method].attach()[0].to("cuda")
    for execution in graph_executions(method):
        model.execution = execution
        inputs, fresh = given(seq, torch.float32), given(seq, torch.float32)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(**inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            logits = model(**inputs).logits
        inputs["input_ids"].copy_(fresh["input_ids"])
        graph.replay()
        torch.testing.assert_close(logits, model(**fresh).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_the_published_form_waits(method):
    model = METHODS[method].attach()[0].to("cuda")
    if "published" not in model.executions:
        pytest.skip("has no published form")
    model.execution = "published"
    with no_host_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        model(**given(16, torch.float32))


@pytest.mark.parametrize("method", ALL)
def test_the_gpu_computes_what_the_cpu_computes(method):
    ids = batch(rows=2, length=9)
    on_cpu, on_gpu = ALL[method].attach()[0].train(), ALL[method].attach()[0].to("cuda").train()
    losses = [model(input_ids=ids.to(model.device), labels=ids.to(model.device)).loss for model in (on_cpu, on_gpu)]
    for loss in losses:
        loss.backward()
    assert relative_error(losses[1].cpu(), losses[0]) < 1e-4
    wanted = on_cpu.adapter_tensors(grad=True)
    errors = {name: relative_error(g.cpu(), wanted[name]) for name, g in on_gpu.adapter_tensors(grad=True).items()}
    assert {name: error for name, error in errors.items() if error > 1e-3} == {}
