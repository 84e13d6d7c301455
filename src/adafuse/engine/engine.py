"""engine: generate text with a causal LM, adapted or bare."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing

import torch

from adafuse.engine.backbone import MODEL_TYPES, addresses, base_of, read_backbone
from adafuse.engine.generic import HfRunner, addresses_of, check_graphs, read_whole
from adafuse.engine.graph import kept_tensors
from adafuse.engine.linears import Gate
from adafuse.engine.readback import Readback
from adafuse.engine.record import Record
from adafuse.engine.requests import Limits, end_ids, read_requests
from adafuse.engine.runner import Runner
from adafuse.engine.sampling import Sampler, is_whole
from adafuse.engine.sequence import Generation
from adafuse.execution import check_available
from adafuse.layers import in_eval_mode
from adafuse.model import AdaFuseModel


class Stream(Iterator[str]):
    """Pieces of a text as they come. ids: the tokens so far. The engine is free again after the last piece, or close().

    close() and cancel() may come from another thread than the one that reads; that one then finds the stream at its end.
    """

    def __init__(self, make_pieces, sequence):
        self._cancelled, self._running = threading.Event(), threading.RLock()
        self._pieces, self._sequence = make_pieces(sequence, self._cancelled), sequence

    def __next__(self) -> str:
        with self._running:
            if self._cancelled.is_set():
                self.close()
            piece = next(self._pieces)
            if self._cancelled.is_set():  # meanwhile
                self.close()
            return piece

    def cancel(self):
        """End it behind the token that is being computed. Waits for nothing: the engine is free when its reader has noticed."""
        self._cancelled.set()

    def close(self):
        """End it now: waits for the token that another thread computes, then the engine is free."""
        self._cancelled.set()
        with self._running:
            if (
                not self._pieces.gi_running
            ):  # else this is called within a step (by a signal's handler), which will see it
                self._pieces.close()

    @property
    def ids(self) -> list[int]:
        return list(self._sequence.ids)


class Engine:
    """Decoding of `model` with buffers that are made once: a KV cache of max_batch sequences of max_seq_len tokens.

    model: an AdaFuseModel or a bare HuggingFace causal LM; the blocks of types llama, mistral, qwen2 and qwen3 are run by the engine, other
    models by their own forward. Its weights are read where they are: what is trained or loaded into it later counts. tokenizer: for
    prompts as strings, text and stop strings. prefill_chunk: tokens of a prompt that are run at once. max_seq_len: cut to the positions
    that the model has.
    kernels: run the steps on the library's kernels, which take batches of up to 8, instead of plain PyTorch; None: on a GPU, for the types
    above. graphs: capture the steps in CUDA graphs, the first time that a batch of such a size and such settings comes; None: on a GPU.

    It computes what the model does in evaluation mode, in the model's dtype. One generation at a time.
    ValueError for a model it does not run, for sizes below 1, and for what kernels and graphs do not take or need; ImportError for kernels
    without Triton.
    """

    @kept_tensors
    def __init__(
        self,
        model,
        max_seq_len: int = 4096,
        max_batch: int = 8,
        *,
        tokenizer=None,
        prefill_chunk: int = 2048,
        kernels: bool | None = None,
        graphs: bool | None = None,
    ):
        for name, value in (("max_seq_len", max_seq_len), ("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: allowed is a whole number, 1 or more")
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self._backbone = self._read_model()
        self.max_seq_len = min(max_seq_len, self._backbone.max_positions)
        on_gpu = self._backbone.device.type == "cuda"
        own = self._runs_blocks()
        self._kernels = on_gpu and own if kernels is None else kernels
        graphs = on_gpu if graphs is None else graphs
        gate = None
        if own and isinstance(model, AdaFuseModel):
            gate = Gate(model.router, model.adafuse_config, len(self._backbone.blocks))
        self._check_ways(gate, graphs, on_gpu)
        sizes = {"max_seq_len": self.max_seq_len, "max_batch": max_batch, "chunk": prefill_chunk}
        runner = Runner if own else HfRunner
        self._runner = runner(self._backbone, gate, **sizes, kernels=self._kernels, graphs=graphs)
        if not own:
            self._try_out()
        self._limits = Limits(self.max_seq_len, max_batch, self._backbone.vocab_size)
        self._readback = Readback(max_batch, self._backbone.device)
        # A graph is queued before the host has read the token of the one before it.
        self._ahead = 1 if graphs else 0
        self._turn, self._running = threading.Lock(), None  # who generates; changed under the lock
        # Of the last generation: tokens that nobody has read, and whether the cache may hold numbers that are not finite.
        self._coming, self._spoilt = deque(), False

    def _runs_blocks(self) -> bool:
        """Whether the engine runs the blocks itself; other families by their own forward."""
        return base_of(self.model).config.model_type in MODEL_TYPES

    def _read_model(self):
        return read_backbone(self.model) if self._runs_blocks() else read_whole(self.model)

    def _check_ways(self, gate, graphs, on_gpu):
        for name, value in (("kernels", self._kernels), ("graphs", graphs)):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: allowed are True, False and None")
        if graphs and not self._runs_blocks():
            check_graphs(self._backbone)
        if graphs and not on_gpu:
            raise ValueError(
                f"graphs=True captures CUDA graphs, and the model is on {self._backbone.device}; move it to a GPU"
            )
        if self._kernels and not self._runs_blocks():
            raise ValueError(
                f'kernels=True is for models of type {", ".join(MODEL_TYPES)}; leave it out, and set model.execution = "fused" for the '
                "adapter's kernels"
            )
        if self._kernels:
            try:
                check_available("fused", self._backbone.device)
            except ValueError as error:
                raise ValueError(
                    f"kernels=True runs GPU kernels, and the model is on {self._backbone.device}; move it to a GPU, or leave kernels out"
                ) from error
            self._check_kernels(gate)

    def _try_out(self):
        """Of a model that runs as it is, the backbone: what an adapter adds runs along."""
        with in_eval_mode(base_of(self.model)):
            if isinstance(self.model, AdaFuseModel):
                with self.model.disable_adapter():
                    self._runner.try_out()
            else:
                self._runner.try_out()

    def _check_kernels(self, gate):
        from adafuse.engine.kernels import check_kernels  # here, since it needs Triton

        check_kernels(self._backbone, gate, self.max_batch)

    def generate(
        self,
        prompts,
        max_new_tokens: int | list[int] = 128,
        temperature: float | list[float] = 0.0,
        top_k: int | list[int] = 0,
        top_p: float | list[float] = 1.0,
        repetition_penalty: float | list[float] = 1.0,
        seed: int | list[int] | None = None,
        stop: str | tuple[str, ...] | list[str] = (),
        logprobs: int | None = None,
        return_routing: bool = False,
        min_new_tokens: int | list[int] = 0,
        eos_token_id: int | list[int] | None = None,
    ) -> list[Generation]:
        """A Generation for each prompt, in order. prompts: up to max_batch strings or lists of token ids, of any lengths.

        The settings from max_new_tokens to seed, and min_new_tokens, are those of `Sampling`: one value for all prompts, or a list
        with one for each. The same seed gives a prompt the same tokens whatever is beside it (up to rounding); so equal prompts
        under one seed give equal texts.
        stop: strings that end a text, which are not part of it. eos_token_id: ids that end it (None: the model's generation config's and
        the tokenizer's; `()`: none). logprobs: n: of each token, and of the n likeliest. return_routing: the experts of each token.
        ValueError for prompts or settings that cannot be run; FloatingPointError if the model's logits are NaN or infinite.
        """
        settings = {
            "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "temperature": temperature, "top_k": top_k,
            "top_p": top_p, "repetition_penalty": repetition_penalty, "seed": seed,
        }  # fmt: skip
        record = self._record(logprobs, return_routing)
        sequences = self._read(prompts, settings, stop, eos_token_id)
        if not sequences:
            return []
        # Closed here: the traceback of an interrupt would keep it, and the engine, busy.
        with closing(self._run(sequences, record)) as tokens:
            for _ in tokens:
                pass
        return [sequence.result(*record.of(row, sequence)) for row, sequence in enumerate(sequences)]

    def stream(self, prompt, *, stop=(), eos_token_id=None, **settings) -> Stream:
        """The text of one prompt (a string or token ids) in pieces, as soon as they are certain; none is half a character.

        settings: those of `Sampling`, as in `generate`. Needs a tokenizer. Checked at once; the engine is in use from the first piece until
        the iterator is exhausted or closed.
        """
        if settings.pop("logprobs", None) is not None or settings.pop("return_routing", False):
            raise ValueError("stream yields text only; logprobs and return_routing are settings of generate")
        if self.tokenizer is None:
            raise ValueError("stream yields text, and the engine has no tokenizer; pass Engine(..., tokenizer=...)")
        (sequence,) = self._read([prompt], settings, stop, eos_token_id)
        return Stream(self._pieces, sequence)

    def _pieces(self, sequence, cancelled):
        with closing(self._run([sequence], Record())) as tokens:
            for (piece,) in tokens:
                if piece:
                    yield piece
                if cancelled.is_set():
                    return

    def _read(self, prompts, settings, stop, eos_token_id):
        ends = end_ids(eos_token_id, base_of(self.model), self.tokenizer)
        return read_requests(prompts, settings, limits=self._limits, tokenizer=self.tokenizer, ends=ends, stop=stop)

    def _record(self, logprobs, routing):
        count = self._runner.logits.shape[1]
        if logprobs is not None and not (is_whole(logprobs) and 0 <= logprobs <= count):
            raise ValueError(f"logprobs={logprobs!r}: allowed is None or a whole number from 0 to {count}")
        if routing and not self._adapted():
            raise ValueError("return_routing=True: the model has no adapter, or it is disabled, so no token is routed")
        if routing and self._runner.captures and self._runner.gate is not None and not self._runner.gate.config.scale:
            raise ValueError(
                "return_routing=True: the plan of lora_alpha=0 holds no weights; pass Engine(..., graphs=False)"
            )
        return Record(logprobs, routing)

    def _adapted(self) -> bool:
        """Whether experts take part: not in a bare model, nor inside `model.disable_adapter()`."""
        return isinstance(self.model, AdaFuseModel) and self.model.has_active_enabled_adapter

    def _run(self, sequences, record) -> Iterator[list[str]]:
        """Continue the sequences to their ends; after each token, the piece of text of each (empty for those that have ended)."""
        mine = object()
        try:
            with self._turn:
                if self._running is not None:
                    raise ValueError(
                        "the engine runs one generation at a time; exhaust or close() the stream that is open, or make another Engine"
                    )
                self._running = mine
            yield from self._steps(sequences, record)
        finally:
            # No call, where Python would look for signals: Ctrl-C, whenever it comes, leaves the engine free.
            if self._running is mine:
                self._running = None

    def _steps(self, sequences, record):
        runner, rows, adapted = self._runner, len(sequences), self._prepare(len(sequences))
        settings, prompts = [each.sampling for each in sequences], [each.prompt for each in sequences]
        self._clean()
        options = {"ends": sequences[0].ends, "vocab_size": runner.logits.shape[1], "device": runner.logits.device}
        sampler = Sampler(settings, prompts, **options)
        sampler = runner.begin(rows, sampler, adapted=adapted, switcher=self._switcher(), addresses=self._addresses())
        self._spoilt = True  # until the tokens say that it is not
        for row, prompt in enumerate(prompts):
            runner.prefill(row, prompt, adapted=adapted, routings=record.prompt(row))
        runner.sample(sampler)
        coming, left = self._coming, max(each.max_new_tokens for each in settings) - 1
        coming.append(self._fetch(rows, record))
        self._spoilt = False
        runner.start_steps()
        while True:
            while left and len(coming) <= self._ahead:
                runner.step(rows, adapted=adapted, sampler=sampler, routings=record.steps)
                coming.append(self._fetch(rows, record))
                left -= 1
            tokens = coming[0]()  # here, and nowhere in a step, the host waits for the device
            coming.popleft()  # after the wait, for who interrupts it: `_clean` still looks at these
            self._spoilt |= min(tokens) < 0  # also of a row that has ended, and still writes its last key
            yield [self._append(row, *pair) for row, pair in enumerate(zip(sequences, tokens, strict=True))]
            if all(each.finish_reason for each in sequences):
                return

    def _clean(self):
        """Rid the cache of numbers that are not finite, which the generation before may have left: a weight of 0 would not hide them."""
        unread = [token for fetch in self._coming for token in fetch()]
        if self._spoilt or min(unread, default=0) < 0:
            self._runner.forget()
        self._coming.clear()
        self._spoilt = False

    @torch.no_grad()
    def _fetch(self, rows, record):
        """The tokens picked last, on their way to the host."""
        picked = self._runner.picked[:rows]
        record.token(self._runner.logits[:rows], picked)
        return self._readback.fetch(picked)

    def _switcher(self):
        return self.model._gate.switcher if isinstance(self.model, AdaFuseModel) else None

    def _addresses(self):
        """Looked at where steps are kept from one generation to the next."""
        if not self._kernels and not self._runner.captures:
            return ()
        if not self._runs_blocks():
            return addresses_of(self.model, self._backbone.dtype)
        return addresses(self._backbone, self.model.router if isinstance(self.model, AdaFuseModel) else None)

    def _append(self, row, sequence, token) -> str:
        if sequence.finish_reason:
            return ""
        if token < 0:
            raise FloatingPointError(
                f"the logits of prompt {row} after {len(sequence.ids)} new tokens are NaN or infinite; check the weights, or use bfloat16 "
                "or float32 instead of float16"
            )
        piece = sequence.append(token)
        if sequence.finish_reason:
            self._runner.halt(row)
        return piece

    def _prepare(self, rows) -> bool:
        """Look at the model as it is now. Returns whether experts take part."""
        if self._read_model() != self._backbone:
            raise ValueError("modules of the model were replaced since the engine was made; make a new Engine for it")
        known = self._runner.logits
        if (self._backbone.dtype, self._backbone.device) != (known.dtype, known.device):
            raise ValueError(
                f"the model was moved or cast ({known.dtype} on {known.device} before, {self._backbone.dtype} on "
                f"{self._backbone.device} now); make a new Engine for it"
            )
        if not self._runs_blocks() and self.model.training:
            raise ValueError("a model that is not of the engine's own families runs as it is: call model.eval() first")
        if self._kernels:
            self._check_kernels(self._runner.gate)
        adapted = self._adapted()
        if isinstance(self.model, AdaFuseModel):
            self._check_switch(rows)
            for bank in self.model.banks.values():
                bank.renew_pack(self._backbone.dtype)  # a write through .data shows in nothing that could be checked
            if self._switcher() is not None:
                self._switcher().check()
                self._switcher().restore()  # prompts, and the backbone alone, run on the base's own weights
        return adapted

    def _check_switch(self, rows):
        if self.model.execution != "switch":
            return
        if not self._kernels and self._runs_blocks():
            raise ValueError(
                'execution="switch" merges experts by a kernel, and this engine computes in plain PyTorch; set model.execution = "auto", '
                "or make an Engine with kernels=True"
            )
        if rows > 1:
            raise ValueError(
                f'execution="switch" merges one token\'s experts into the weights, so it runs one prompt at a time; got {rows}: set '
                'model.execution = "auto" for more'
            )
