"""What `decode.py` times: ways to run one more token of a batch, each with its cache, its sampling and, where it can, a CUDA graph.

Every one has `token` [B], where the next input is put, `picked` [B], the token it chose, `logits` [B, V], `step`, and `restart`.
"""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch
from timing import graph_of
from transformers import DynamicCache, StaticCache

from adafuse import Engine
from adafuse.baselines import deltas, routers
from adafuse.engine.kernels import Step
from adafuse.engine.runner import Runner
from adafuse.engine.sampling import Sampler, Sampling


@contextmanager
def parts_compiled(model, **options):
    """torch.compile for what lies between the matmuls: norms, rotary positions, the peers' choices, masks and sums.

    Whole blocks of the peers do not compile into one piece, since their routing travels in context variables. options: torch.compile's.
    """
    compiled = partial(torch.compile, dynamic=False, **options)
    modeling = sys.modules[type(model.get_base_model()).__module__]
    norm = next(cls for name, cls in vars(modeling).items() if name.endswith("RMSNorm") and isinstance(cls, type))
    with ExitStack() as patches:
        for owner, name in ((norm, "forward"), (modeling, "apply_rotary_pos_emb"), (routers, "choose")):
            patches.enter_context(mock.patch.object(owner, name, compiled(getattr(owner, name))))
        patches.enter_context(mock.patch.dict(deltas.ADD, graph=compiled(deltas.ADD["graph"])))
        # Every shape of the linears is compiled for itself.
        patches.enter_context(torch._dynamo.config.patch(recompile_limit=64))
        yield


class HfRun:
    """A HuggingFace causal LM, bare or under an adapter: "eager" with the cache that grows; "graphed", "compiled" with the static one.

    ids [B, S]: the prompts. As many tokens as `new` follow. start False: `start` is called later, before the first step.
    """

    def __init__(self, model, ids, new, how, compile_mode=None, *, start=True):
        self.model, self.how, self.device = model, how, ids.device
        batch, length = ids.shape
        self.length = length
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.token, self.picked = torch.zeros(2, batch, dtype=torch.int64, device=ids.device)
        self.cache = (
            DynamicCache(config=base.config)
            if how == "eager"
            else StaticCache(config=base.config, max_cache_len=length + new)
        )
        self.places = torch.arange(length + new, device=ids.device)
        self.position = torch.full((batch, 1), length, device=ids.device)
        for part in ids.split(512, dim=1):
            model(input_ids=part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.forward = model
        if how == "compiled":
            self.forward = torch.compile(model, dynamic=False, mode=compile_mode)
        if start:
            self.start()

    def start(self):
        """Make the step: what is patched now, and how the model is executed, stays in its graph."""
        self.step = self._step
        if self.how != "eager" and self.device.type == "cuda":
            self.step = graph_of(self._step, warmup=3).replay

    def _step(self):
        given = {"input_ids": self.token[:, None], "past_key_values": self.cache, "use_cache": True}
        if self.how != "eager":
            # A ready mask: making one waits for the device.
            mask = (self.places <= self.position)[:, None, None, :]
            given |= {"attention_mask": mask, "position_ids": self.position}
        self.logits = self.forward(**given).logits[:, -1]
        self.picked.copy_(self.logits.float().argmax(-1))
        self.position.add_(1)

    def restart(self):
        """Back to the end of the prompt; a cache that grows goes on."""
        if self.how == "eager":
            return
        self.position.fill_(self.length)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)


class EngineRun:
    """The engine's steps as `Engine.generate` runs them: kernels, and a CUDA graph on a GPU.

    ids [B, S]: the prompts. make_step(backbone, gate, cache, rotary, logits): another step in place of the engine's.
    """

    def __init__(self, model, ids, new, make_step=None):
        batch, length = ids.shape
        sizes = {"max_seq_len": length + new, "max_batch": batch, "prefill_chunk": min(512, length)}
        engine = Engine(model, **sizes, kernels=True, graphs=make_step is None and torch.cuda.is_available())
        adapted = engine._prepare(batch)
        options = {"switcher": engine._switcher(), "addresses": engine._addresses()}
        self._start(engine._runner, ids, adapted, make_step, options)

    @classmethod
    def of_backbone(cls, backbone, ids, new, make_step):
        """Of a backbone that was read before an adapter wrapped its linears: prompts are the backbone's alone."""
        batch, length = ids.shape
        sizes = {"max_seq_len": length + new, "max_batch": batch, "chunk": min(512, length)}
        run = cls.__new__(cls)
        run._start(Runner(backbone, None, **sizes, kernels=True), ids, False, make_step, {})
        return run

    def _start(self, runner, ids, adapted, make_step, options):
        self.runner, self.adapted = runner, adapted
        self.batch, self.length = ids.shape
        vocab, device = runner.logits.shape[1], runner.logits.device
        sampler = Sampler([Sampling()] * self.batch, [], ends=(), vocab_size=vocab, device=device)
        self.sampler = runner.begin(self.batch, sampler, adapted=adapted, **options)
        self.step = self._step
        if make_step is not None:
            self._take_step(make_step)
        for row, prompt in enumerate(ids.tolist()):
            runner.prefill(row, prompt, adapted=adapted)
        runner.start_steps()
        self.token, self.picked = runner.tokens[: self.batch], runner.picked[: self.batch]
        self.logits = runner.logits[: self.batch]

    def restart(self):
        """Back to the end of the prompt."""
        self.runner.positions[: self.batch] = self.length

    def _take_step(self, make_step):
        runner, batch = self.runner, self.batch
        assert runner.padded(batch) == batch, "a batch that needs no padding"
        given = (runner.backbone, runner.gate, runner.cache[:, :, :batch], runner.rotary, runner.logits[:batch])
        step = runner._steps[batch, self.adapted] = make_step(*given)
        if runner.tokens.is_cuda:
            self.step = graph_of(self._step).replay
        if isinstance(step, MergePerMatrix):
            step.restore()

    def _step(self):
        self.runner.step(self.batch, adapted=self.adapted, sampler=self.sampler)


class Without(Step):
    """The engine's step with some launches left out, to learn what they cost: "attention", "between" (norms, activation)."""

    def __init__(self, *given, leave_out=()):
        super().__init__(*given)
        self.leave_out = leave_out

    def _attend(self, *given, **options):
        if "attention" not in self.leave_out:
            super()._attend(*given, **options)

    def _add_norm(self, *given):
        if "between" not in self.leave_out:
            super()._add_norm(*given)

    def _activate(self, *given):
        if "between" not in self.leave_out:
            super()._activate(*given)


class MergePerMatrix(Step):
    """Merging by a vendor's library: for every matrix the chosen experts are gathered, then one addmm from an untouched copy."""

    def __init__(self, *given):
        super().__init__(*given, switcher=self)
        self.copies = [
            [
                (linear, linear.base.weight.detach().clone())
                for name in runs
                for run in runs[name]
                for linear in run.linears
            ]
            for runs in self.blocks
        ]

    def _merge(self, plan):
        found = [plan.of_block(decision).chosen for decision in range(len(plan.experts))]
        found = [(chosen.rows()[0], chosen.scales()[0]) for chosen in found]
        for index, block in enumerate(self.copies):
            rows, scales = found[index if len(found) > 1 else 0]
            for linear, copy in block:
                a, b = linear.bank.matrices(copy.dtype)
                left = (b[rows] * scales[:, None]).to(copy.dtype)
                torch.addmm(copy, left.T, a[rows], out=linear.base.weight.detach())

    def restore(self):
        for block in self.copies:
            for linear, copy in block:
                linear.base.weight.detach().copy_(copy)
