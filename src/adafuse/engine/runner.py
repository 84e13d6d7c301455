"""runner: the buffers of an engine, the prefill of a prompt and the step of a token. Knows tokens, not requests."""

from __future__ import annotations

import torch

from adafuse.engine.attention import rotary_table
from adafuse.engine.backbone import Backbone
from adafuse.engine.forward import forward
from adafuse.engine.graph import Graphs, kept_tensors
from adafuse.engine.linears import Gate
from adafuse.engine.sampling import Sampler, Sampling

LEAST_CHUNK = 16  # tokens: the end of a prompt is padded to a power of two from here on


class Runner:
    """Fixed buffers for `max_batch` sequences of up to `max_seq_len` tokens, a row each.

    cache [L, 2, max_batch, kv_heads, length, head_dim] and logits [max_batch, V] in the model's dtype (length: max_seq_len up to a whole
    chunk); tokens, picked, positions and advance [max_batch] int64. Rows of a shorter batch are the first ones.
    kernels: steps run on the kernels of `adafuse.ops`. graphs: steps are captured in CUDA graphs. With either, a batch is padded to a
    size that is kept ready: a power of two, or max_batch.
    """

    def __init__(
        self, backbone: Backbone, gate: Gate | None, *, max_seq_len: int, max_batch: int, chunk: int, kernels=False, graphs=False
    ):  # fmt: skip
        self.backbone, self.gate, self.chunk, self.kernels = backbone, gate, min(chunk, max_seq_len), kernels
        self.length = -(-max_seq_len // self.chunk) * self.chunk
        self._last = max_seq_len - 1  # position
        dtype, device = backbone.dtype, backbone.device
        self.tokens, self.picked, self.positions, self.advance = torch.zeros(
            4, max_batch, dtype=torch.int64, device=device
        )
        self._part = torch.zeros(2, 1, self.chunk, dtype=torch.int64, device=device)  # tokens and positions of a chunk
        self.logits = torch.zeros(max_batch, backbone.head.out_features, dtype=dtype, device=device)
        self._make_cache(max_batch)
        self._steps, self._samplers = {}, {}
        self._graphs = Graphs(device) if graphs else None
        self._state, self._switcher = None, None

    @torch.no_grad()
    def _make_cache(self, max_batch):
        backbone, dtype, device = self.backbone, self.backbone.dtype, self.backbone.device
        shape = (len(backbone.blocks), 2, max_batch, backbone.num_kv_heads, self.length, backbone.head_dim)
        # Zeros: attention gives what lies past a sequence the weight 0, which would not hide a NaN.
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self.rotary = rotary_table(backbone.rotary, self.length, dtype).to(device)

    # --- a generation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, rows: int, sampler: Sampler, *, adapted: bool, switcher=None, addresses=()) -> Sampler:
        """Make ready for a generation of so many sequences; returns the sampler that its steps take.

        switcher: merges each token's experts into the weights. addresses: of what the steps read, by which those made or captured
        before are known to be good still.
        """
        for buffer in (self.tokens, self.picked, self.positions, self.advance):
            buffer.zero_()
        self._renew((switcher, *addresses))
        self._switcher = switcher if adapted else None
        if self._graphs is None:
            return sampler
        padded = self.padded(rows)
        kept = self._kept_sampler(padded, sampler.plain)
        name = (padded, adapted, sampler.plain)
        if name not in self._graphs:
            self.start_steps()
            if self.kernels:
                self._kernel_step(padded, adapted)  # its buffers, outside the capture
            self._graphs.capture(name, lambda: self._step(padded, adapted, kept))
            if self._switcher is not None:
                self._switcher.restore()
        if not sampler.plain:
            kept.take(sampler)  # behind the capture, whose runs have drawn and seen tokens
        return kept

    def _renew(self, state):
        """Forget the steps that read what has moved since."""
        if state != self._state:
            self._steps.clear()
            if self._graphs is not None:
                self._graphs.clear()
            self._state = state

    @kept_tensors
    def _kept_sampler(self, padded, plain):
        """A sampler in buffers that a graph can hold, always the same one for so many rows."""
        if (padded, plain) not in self._samplers:
            count, device = self.logits.shape[1], self.logits.device
            if plain:
                kept = Sampler([Sampling()] * padded, [], ends=(), vocab_size=count, device=device)
            else:
                kept = Sampler.room(padded, self._last + 1, count, device)
            self._samplers[padded, plain] = kept
        return self._samplers[padded, plain]

    def start_steps(self):
        """The prompts are done: from here on the weights hold a token's experts, if they are switched."""
        if self._switcher is not None:
            from adafuse.engine.kernels import begin_merging

            begin_merging(self._switcher)

    @property
    def captures(self) -> bool:
        """Whether steps are captured in CUDA graphs."""
        return self._graphs is not None

    def padded(self, rows: int) -> int:
        """How many rows a step of so many sequences has."""
        if self._graphs is None and not self.kernels:
            return rows
        return min(1 << (rows - 1).bit_length(), len(self.tokens))

    @torch.no_grad()
    def prefill(self, row: int, ids: list[int], *, adapted: bool, routings: list | None = None):
        """Run a prompt in row `row`, a chunk at a time: its logits are those after the last token. routings: gets each chunk's."""
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            size = min(self.chunk, max(LEAST_CHUNK, 1 << (len(part) - 1).bit_length()))
            # Padded with a token of the prompt: nothing sees it, and its place is taken by the next chunk or step.
            tokens, positions = self._part[:, :, :size]
            tokens.copy_(torch.tensor([part + part[-1:] * (size - len(part))]))
            torch.arange(start, start + size, out=positions[0])
            positions.clamp_(max=self._last)  # beyond it a rotary embedding may have other frequencies, for all
            # Logits of the chunk's last token; those of the last chunk count.
            last = len(part) - 1
            self.logits[row].copy_(self._forward(tokens, positions, row, start + size, adapted, last))
            if routings is not None:
                routings.append(self._routing(len(part)))
        self.positions[row], self.advance[row] = len(ids), 1

    @torch.no_grad()
    def sample(self, sampler: Sampler):
        """picked: the next tokens after the logits of the sampler's rows, -1 where they are no numbers; tokens: what goes on."""
        rows = len(sampler.greedy)
        self.picked[:rows].copy_(sampler.sample(self.logits[:rows].float()))
        torch.clamp(self.picked[:rows], min=0, out=self.tokens[:rows])

    @torch.no_grad()
    def step(self, rows: int, *, adapted: bool, sampler: Sampler | None = None, routings: list | None = None):
        """tokens at positions of the first `rows` rows -> their logits; positions += advance; then `sample`. No wait for the device."""
        padded = self.padded(rows)
        name = (padded, adapted, sampler is not None and sampler.plain)
        if sampler is not None and self._graphs is not None:
            self._graphs.replay(name)
            self._note_routing(*name)
        else:
            self._step(padded, adapted, sampler)
        if routings is not None:
            routings.append(self._routing(rows))

    def _note_routing(self, rows, adapted, plain):
        """A replay runs no Python, so nobody else says which plan it wrote."""
        if adapted and self.gate is not None:
            self.gate.written = self.gate.plan(rows)

    def _step(self, rows, adapted, sampler):
        tokens, positions = self.tokens[:rows], self.positions[:rows]
        if self.kernels:
            self._step_on_kernels(rows, adapted, sampler, tokens, positions)
            return
        self.logits[:rows].copy_(self._forward(tokens[:, None], positions[:, None], 0, self.length, adapted))
        self._advance(positions)
        if sampler is not None:
            self.sample(sampler)

    def _step_on_kernels(self, rows, adapted, sampler, tokens, positions):
        from adafuse.ops.launch import since_hopper  # here, since it needs Triton

        pdl = since_hopper(tokens)
        step = self._kernel_step(rows, adapted)
        step.run(tokens, positions, pdl=pdl)
        if sampler is not None and sampler.plain:
            moves = {"positions": positions, "advance": self.advance[:rows], "last": self._last}
            step.pick(self.picked[:rows], tokens, **moves, pdl=pdl)
            return
        self._advance(positions)
        if sampler is not None:
            self.sample(sampler)

    @kept_tensors
    def _kernel_step(self, rows, adapted):
        from adafuse.engine.kernels import Step  # here, since it needs Triton

        name = (rows, adapted)
        if name not in self._steps:
            gate, switcher = (self.gate, self._switcher) if adapted else (None, None)
            buffers = self.cache[:, :, :rows], self.rotary, self.logits[:rows]
            self._steps[name] = Step(self.backbone, gate, *buffers, switcher=switcher)
        return self._steps[name]

    def _advance(self, positions):
        """A row that has ended may be a step ahead of what the host knows: it stays within what the engine serves."""
        positions.add_(self.advance[: len(positions)]).clamp_(max=self._last)

    def halt(self, row: int):
        """The sequence of a row has ended: further steps leave it where it is."""
        self.advance[row] = 0

    def forget(self):
        """Clear the cache, of all rows."""
        self.cache.zero_()

    def _forward(self, tokens, positions, row, length, adapted, last=None):
        """Logits of tokens [B, S], the rows of the batch from `row` on, against `length` positions of the cache: [B S, V]; or, of
        one row, those of token `last` [V]."""
        cache = self.cache[:, :, row : row + len(tokens), :, :length]
        # Autocast would give the cache another dtype than it has.
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = forward(self.backbone, self.gate if adapted else None, tokens, positions, cache, self.rotary)
            return self.backbone.head(hidden if last is None else hidden[last])

    def _routing(self, tokens):
        """A copy of the routing of the first `tokens` tokens of the last forward."""
        return self.gate.last(tokens)
