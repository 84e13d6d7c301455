"""runner: the buffers of an engine, the prefill of a prompt and the step of a token. Knows tokens, not requests."""

from __future__ import annotations

import torch

from adafuse.engine.attention import rotary_table
from adafuse.engine.backbone import Backbone
from adafuse.engine.forward import forward
from adafuse.engine.linears import Gate
from adafuse.router import Routing

LEAST_CHUNK = 16  # tokens: the end of a prompt is padded to a power of two from here on


class Runner:
    """Fixed buffers for `max_batch` sequences of up to `max_seq_len` tokens, a row each.

    cache [L, 2, max_batch, kv_heads, length, head_dim] in the model's dtype (length: max_seq_len up to a whole chunk); tokens,
    positions and advance [max_batch] int64; logits [max_batch, V] fp32. Rows of a shorter batch are the first ones.
    """

    def __init__(self, backbone: Backbone, gate: Gate | None, *, max_seq_len: int, max_batch: int, chunk: int):
        self.backbone, self.gate, self.chunk = backbone, gate, min(chunk, max_seq_len)
        length = -(-max_seq_len // self.chunk) * self.chunk
        dtype, device = backbone.dtype, backbone.device
        shape = (len(backbone.blocks), 2, max_batch, backbone.num_kv_heads, length, backbone.head_dim)
        # Zeros: attention gives what lies past a sequence the weight 0, which would not hide a NaN.
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self.tokens, self.positions, self.advance = torch.zeros(3, max_batch, dtype=torch.int64, device=device)
        self._part = torch.zeros(2, 1, self.chunk, dtype=torch.int64, device=device)  # tokens and positions of a chunk
        with torch.no_grad():
            self.rotary = rotary_table(backbone.rotary, length, dtype).to(device)
        self.logits = torch.zeros(max_batch, backbone.head.out_features, dtype=torch.float32, device=device)

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
            hidden = self._forward(tokens, positions, self.cache[:, :, row : row + 1, :, : start + size], adapted)
            if routings is not None:
                routings.append(self._routing(len(part)))
        self.logits[row].copy_(self.backbone.head(hidden[len(part) - 1]))
        self.positions[row], self.advance[row] = len(ids), 1

    @torch.no_grad()
    def step(self, rows: int, *, adapted: bool, routings: list | None = None):
        """tokens at positions of the first `rows` rows -> their logits; then positions += advance. No wait for the device."""
        tokens, positions = self.tokens[:rows], self.positions[:rows]
        hidden = self._forward(tokens[:, None], positions[:, None], self.cache[:, :, :rows], adapted)
        self.logits[:rows].copy_(self.backbone.head(hidden))
        positions.add_(self.advance[:rows])
        if routings is not None:
            routings.append(self._routing(rows))

    def halt(self, row: int):
        """The sequence of a row has ended: further steps leave it where it is."""
        self.advance[row] = 0

    def forget(self):
        """Clear the cache: of numbers that are not finite a later sequence would not be rid otherwise."""
        self.cache.zero_()

    def _forward(self, tokens, positions, cache, adapted):
        # Autocast would give the cache another dtype than it has.
        with torch.autocast(tokens.device.type, enabled=False):
            return forward(self.backbone, self.gate if adapted else None, tokens, positions, cache, self.rotary)

    def _routing(self, tokens):
        """A copy of the routing of the first `tokens` tokens of the last forward."""
        routing = self.gate.routing
        return Routing(routing.experts[0, :tokens].clone(), routing.weights[0, :tokens].clone())
