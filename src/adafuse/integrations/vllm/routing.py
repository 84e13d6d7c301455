"""Step: the routing of one step of the engine, decided once for all layers, in buffers that stay where they are.

Knows torch and the adapter's router, not vLLM. Nothing here waits for the device.
"""

from __future__ import annotations

from functools import cached_property

import torch

from adafuse.config import AdaFuseConfig
from adafuse.costs import CROWD_TOKENS
from adafuse.integrations.vllm.op import Group, Room, Routing, Shape, aligned, few, tile_counts, view, views
from adafuse.router import Router

# Up to so many tokens, or so many rows of the router times tokens, the launches of `ops.route` are taken to be quicker than two dozen of
# PyTorch: they read a token's h0 for each row anew.
ROUTE_TOKENS, ROUTE_ROWS = 64, 1 << 14


class Step:
    """Routes the tokens of a step from h0 and writes the outcome into `routing`, which the linears of all blocks read.

    router: fp32, where the tokens are. max_tokens: of a step. max_requests: of a step. A request is adapted unless
    `set_bare` said otherwise; tokens that pad a step to a captured size are of no request and get no adapter.
    kernels: whether the linears run the Triton kernels (None: on a CUDA device) or the dense form; they read
    different buffers. Each layer joins before the first is given its room, and runs once in each step.
    """

    def __init__(
        self, router: Router, config: AdaFuseConfig, *, hidden_size, max_tokens, max_requests, dtype, kernels=None
    ):
        self.router, self.config = router, config
        self.max_tokens, self.max_requests = max_tokens, max_requests
        device = self.device = router.device
        self.shape = Shape(router.num_decisions, config.num_experts, config.top_k, config.r, config.shared_rank)
        # h0 as the model reads it: a captured part of the model would else read where the last step's embeddings were.
        self.h0 = torch.zeros(max_tokens, hidden_size, dtype=dtype, device=device)
        self.adapted = torch.ones(max_requests + 1, dtype=torch.float32, device=device)
        self.load = torch.zeros(router.num_decisions, config.num_experts, dtype=torch.int64, device=device)
        self._token = torch.arange(max_tokens + 1, dtype=torch.int32, device=device)
        self._kernels = device.type == "cuda" if kernels is None else kernels
        self.routing = self._buffers(device)
        self.by_decision = self.routing.each()  # the same tensors for all layers: a graph has them as inputs
        self._groups: list[Group | None] = []  # of the layers

    def _buffers(self, device) -> Routing:
        d, tokens, shape = self.shape.decisions, self.max_tokens, self.shape
        ints, floats = ({"dtype": dtype, "device": device} for dtype in (torch.int32, torch.float32))
        order, counts, blocks = 0, 0, 0
        if self._kernels:
            # Of all sizes of a step: tiles are largest for many tokens, so their number has its peaks at powers of two.
            sizes = [tile_counts(n, shape) for n in {tokens, *(1 << i for i in range(tokens.bit_length()))}]
            most = max(num_tiles for _, _, num_tiles, _ in sizes)
            order, counts = tokens, most
            blocks = most * max(num_blocks for _, _, _, num_blocks in sizes)
        # Experts 0, not uninitialised memory: a kernel must never follow an index that was not written.
        return Routing(
            experts=torch.zeros(d, aligned(tokens * shape.top_k), **ints),
            weights=torch.zeros(d, aligned(tokens * shape.top_k), **floats),
            shared=torch.zeros(tokens, **floats),
            gates=torch.zeros(d, aligned(tokens * (shape.num_experts + 1)), **floats),
            order=torch.zeros(d, aligned(order), **ints),
            counts=torch.zeros(d, aligned(counts), **ints),
            blocks=torch.zeros(d, aligned(blocks), **ints),
        )

    def join(self, group: Group | None) -> int:
        """A layer will read this step; its number.

        group: what it computes, base and experts together; None: it adds its experts to what the base made.
        """
        if "room" in vars(self):
            raise ValueError("a layer joins a step whose room is given out already")
        self._groups.append(group)
        return len(self._groups) - 1

    @cached_property
    def room(self) -> Room:
        """Of all layers, a row each."""
        sizes = [(0,) * len(Room._fields), *(self._needed(group) for group in self._kinds)]
        layers = len(self._groups)
        return Room(
            *(
                torch.zeros(layers, max(each), dtype=torch.int32, device=self.device)
                for each in zip(*sizes, strict=True)
            )
        )

    def room_of(self, layer: int) -> Room:
        """A layer's own, when all have joined."""
        return Room(*(buffer[layer] for buffer in self.room))

    @cached_property
    def _kinds(self) -> set[Group | None]:
        return set(self._groups)

    def _needed(self, group) -> tuple[int, ...]:
        """How many int32 of each buffer of `Room`."""
        if not self._kernels or group is None:
            return (0,) * len(Room._fields)
        from adafuse.integrations.vllm.fused import room_of
        from adafuse.ops.launch import processors

        return room_of(group, self.max_tokens, processors(self.h0))

    def set_bare(self, bare: list[bool]):
        """Which requests of the batch, by their place in it, use the base alone. One copy, without a wait."""
        pin = self.device.type == "cuda"
        rows = torch.tensor([0.0 if b else 1.0 for b in bare], dtype=torch.float32, pin_memory=pin)
        self.adapted[: len(bare)].copy_(rows, non_blocking=True)

    def set_adapted(self, adapted: torch.Tensor):
        """The same from the device: [requests] fp32, 1 for a request that has the adapter, else 0."""
        self.adapted[: len(adapted)].copy_(adapted)

    def one_request(self, tokens: int) -> torch.Tensor:
        """`starts` for a step whose tokens are all taken for those of one request, its padding too."""
        return self._token[: tokens + 1 : tokens].contiguous()

    @torch.no_grad()
    def route(self, h0: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        """Decide for the tokens h0 [T, H], write the outcome, and return h0 in its buffer.

        starts [requests + 1] int32: where each request's tokens begin, then their number (a graph's padding repeats
        it). None: no token belongs to a request (the engine measures memory).
        """
        tokens = len(h0)
        if tokens > self.max_tokens:
            raise ValueError(
                f"a step of {tokens} tokens came, with room for {self.max_tokens} (max_num_batched_tokens)"
            )
        k = self.shape.top_k
        experts, weights = (views(buffer, tokens, k) for buffer in (self.routing.experts, self.routing.weights))
        read, shared = self._read(tokens), view(self.routing.shared, tokens)
        if self._kernels and (tokens <= ROUTE_TOKENS or tokens * self._rows <= ROUTE_ROWS):
            self._choose_by_kernels(h0, experts, weights, shared, starts, "gates" in read)
        else:
            self._choose(h0, experts, weights, shared, starts)
            if "gates" in read and "tiles" not in read:
                self._write_gates(experts, weights)
        if "tiles" in read:
            self._write_tiles(experts, weights)
        if self._kernels and tokens <= CROWD_TOKENS:
            self._empty_room()
        buffer = self.h0[:tokens]
        buffer.copy_(h0)
        return buffer

    @cached_property
    def _rows(self) -> int:
        """Of the router, or of its hidden layer."""
        hidden = self.router.hidden
        return max(len(self.router.weight), 0 if hidden is None else len(hidden.weight))

    def _active(self, tokens, starts):
        """[T] fp32: 1 for the tokens of adapted requests, else 0."""
        if starts is None:
            return torch.zeros(tokens, dtype=torch.float32, device=self.device)
        token = self._token[:tokens]
        request = torch.searchsorted(starts[1:].contiguous(), token, right=True, out_int32=True)
        adapted = self.adapted[request.clamp_(max=self.max_requests).long()]
        return adapted * (token < starts[-1])

    def _choose(self, h0, experts, weights, shared, starts):
        active, routing = self._active(len(h0), starts), self.router(h0[None])
        experts.copy_(routing.experts[0].movedim(1, 0))
        torch.mul(routing.weights[0].movedim(1, 0), self.config.scale * active[:, None], out=weights)
        torch.mul(active, self.config.shared_scale, out=shared)
        self._count(experts, active)

    def _choose_by_kernels(self, h0, experts, weights, shared, starts, with_gates):
        """The same, and the gates, in two launches."""
        from adafuse.ops.route import Requests, route

        router, rows = self.router, {"dtype": torch.float32, "device": h0.device}
        hidden = None if router.hidden is None else router.hidden.weight
        route(
            h0,
            router.weight,
            experts,
            weights,
            num_experts=router.num_experts,
            scale=self.config.scale,
            logits=torch.empty(len(h0), len(router.weight), **rows),
            hidden=hidden,
            hidden_out=None if hidden is None else torch.empty(len(h0), len(hidden), **rows),
            gates=views(self.routing.gates, len(h0), router.num_experts + 1) if with_gates else None,
            requests=Requests(starts, self.adapted, shared, self.config.shared_scale, self.load),
        )

    def _count(self, experts, active):
        chosen = active.to(torch.int64)[:, None].expand(experts.shape[1:]).reshape(1, -1)
        self.load.scatter_add_(1, experts.flatten(1).long(), chosen.expand(len(experts), -1))

    def _read(self, tokens) -> set[str]:
        """How the layers read the routing of so many tokens: "chosen" (experts and weights), "gates", or "tiles"."""
        if not self._kernels:
            return {"gates"}
        from adafuse.ops.gated import takes_in_order

        forms = {"tiles" if group is None else group.form(tokens) for group in self._kinds}
        beside = "chosen" if few(tokens) else "tiles"
        in_order = takes_in_order(tile_counts(tokens, self.shape)[2], self.shape.top_k, self.shape.num_experts)
        read = {"decode": "chosen", "crowd": "gates", "pair": "gates", "gated": "gates" if in_order else "tiles"}
        return {read.get(form, beside) for form in forms}

    def _write_gates(self, experts, weights):
        gates = views(self.routing.gates, experts.shape[1], self.shape.num_experts + 1).zero_()
        gates.scatter_(-1, experts.long(), weights)
        self._write_shared(gates)

    def _write_tiles(self, experts, weights):
        """The gates too."""
        from adafuse.ops.layout import lay_out

        shape = self.shape
        found = lay_out(experts, weights, num_experts=shape.num_experts, r=shape.r, shared_rank=shape.shared_rank)
        for name in ("order", "counts", "blocks", "gates"):
            part = getattr(found, name)
            views(getattr(self.routing, name), *part.shape[1:]).copy_(part)
        self._write_shared(views(self.routing.gates, *found.gates.shape[1:]))

    def _write_shared(self, gates):
        gates[..., -1] = view(self.routing.shared, gates.shape[1])

    def _empty_room(self):
        """For the launches of all layers at once."""
        from adafuse.ops.ranks import EMPTY

        self.room.h.fill_(EMPTY.value)
        self.room.flags.zero_()
