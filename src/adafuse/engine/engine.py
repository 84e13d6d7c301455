"""engine: generate text with a model of the Llama family, adapted or bare."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import torch

from adafuse.engine.backbone import read_backbone
from adafuse.engine.linears import Gate
from adafuse.engine.record import Record
from adafuse.engine.requests import Limits, end_ids, read_requests
from adafuse.engine.runner import Runner
from adafuse.engine.sampling import Sampler
from adafuse.engine.sequence import Generation
from adafuse.model import AdaFuseModel


class Engine:
    """Decoding of `model` with buffers that are made once: a KV cache of max_batch sequences of max_seq_len tokens.

    model: an AdaFuseModel or a bare HuggingFace causal LM of type llama, mistral, qwen2 or qwen3. Its weights are read where they are:
    what is trained or loaded into it later counts. tokenizer: for prompts as strings, text and stop strings. prefill_chunk: tokens of a
    prompt that are run at once. max_seq_len: cut to the positions that the model's rotary embedding serves.

    It computes what the model does in evaluation mode, in the model's dtype. One generation at a time.
    ValueError for a model it does not run, and for sizes below 1.
    """

    def __init__(self, model, max_seq_len: int = 4096, max_batch: int = 8, *, tokenizer=None, prefill_chunk: int = 512):
        for name, value in (("max_seq_len", max_seq_len), ("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: allowed is a whole number, 1 or more")
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self._backbone = read_backbone(model)
        self.max_seq_len = min(max_seq_len, self._backbone.max_positions)
        gate = None
        if isinstance(model, AdaFuseModel):
            gate = Gate(model.router, model.adafuse_config, len(self._backbone.blocks))
        sizes = {"max_seq_len": self.max_seq_len, "max_batch": max_batch, "chunk": prefill_chunk}
        self._runner = Runner(self._backbone, gate, **sizes)
        self._limits = Limits(self.max_seq_len, max_batch, self._backbone.vocab_size)
        self._busy = threading.Lock()

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

    def stream(self, prompt, *, stop=(), eos_token_id=None, **settings) -> Iterator[str]:
        """The text of one prompt (a string or token ids) in pieces, as soon as they are certain; none is half a character.

        settings: those of `Sampling`, as in `generate`. Needs a tokenizer. Checked at once; the engine is in use from the first piece until
        the iterator is exhausted or closed.
        """
        if self.tokenizer is None:
            raise ValueError("stream yields text, and the engine has no tokenizer; pass Engine(..., tokenizer=...)")
        (sequence,) = self._read([prompt], settings, stop, eos_token_id)
        return self._pieces(sequence)

    def _pieces(self, sequence):
        with closing(self._run([sequence], Record())) as tokens:
            for (piece,) in tokens:
                if piece:
                    yield piece

    def _read(self, prompts, settings, stop, eos_token_id):
        ends = end_ids(eos_token_id, self._base(), self.tokenizer)
        return read_requests(prompts, settings, limits=self._limits, tokenizer=self.tokenizer, ends=ends, stop=stop)

    def _base(self):
        return self.model.get_base_model() if isinstance(self.model, AdaFuseModel) else self.model

    def _record(self, logprobs, routing):
        count = self._runner.logits.shape[1]
        if logprobs is not None and (
            isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= count
        ):
            raise ValueError(f"logprobs={logprobs!r}: allowed is None or a whole number from 0 to {count}")
        if routing and not self._adapted():
            raise ValueError("return_routing=True: the model has no adapter, or it is disabled, so no token is routed")
        return Record(logprobs, routing)

    def _adapted(self) -> bool:
        """Whether experts take part: not in a bare model, nor inside `model.disable_adapter()`."""
        return isinstance(self.model, AdaFuseModel) and self.model.has_active_enabled_adapter

    def _run(self, sequences, record) -> Iterator[list[str]]:
        """Continue the sequences to their ends; after each token, the piece of text of each (empty for those that have ended)."""
        if not self._busy.acquire(blocking=False):
            raise ValueError(
                "the engine runs one generation at a time; exhaust or close() the stream that is open, or make another Engine"
            )
        try:
            adapted = self._prepare()
            settings, prompts = [each.sampling for each in sequences], [each.prompt for each in sequences]
            logits = self._runner.logits[: len(sequences)]
            sampler = Sampler(
                settings, prompts, ends=sequences[0].ends, vocab_size=logits.shape[1], device=logits.device
            )
            for row, prompt in enumerate(prompts):
                self._runner.prefill(row, prompt, adapted=adapted, routings=record.prompt(row))
            while True:
                tokens = self._next(sampler, logits, record)
                yield [self._append(row, *pair) for row, pair in enumerate(zip(sequences, tokens, strict=True))]
                if all(each.finish_reason for each in sequences):
                    return
                self._runner.step(len(sequences), adapted=adapted, routings=record.steps)
        finally:
            self._busy.release()

    @torch.no_grad()
    def _next(self, sampler, logits, record) -> list[int]:
        """The next token of each sequence. Here, and nowhere in a step, the host waits for the device."""
        tokens = sampler.sample(logits)
        self._runner.tokens[: len(tokens)].copy_(tokens.clamp(min=0))
        record.token(logits, tokens)
        return tokens.tolist()

    def _append(self, row, sequence, token) -> str:
        if sequence.finish_reason:
            return ""
        if token < 0:
            self._runner.forget()
            raise FloatingPointError(
                f"the logits of prompt {row} after {len(sequence.ids)} new tokens are NaN or infinite; check the weights, or use bfloat16 "
                "or float32 instead of float16"
            )
        piece = sequence.append(token)
        if sequence.finish_reason:
            self._runner.halt(row)
        return piece

    def _prepare(self) -> bool:
        """Look at the model as it is now. Returns whether experts take part."""
        if read_backbone(self.model) != self._backbone:
            raise ValueError("modules of the model were replaced since the engine was made; make a new Engine for it")
        if (self._backbone.dtype, self._backbone.device) != (self._runner.cache.dtype, self._runner.cache.device):
            raise ValueError(
                f"the model was moved or cast ({self._runner.cache.dtype} on {self._runner.cache.device} before, {self._backbone.dtype} on "
                f"{self._backbone.device} now); make a new Engine for it"
            )
        if isinstance(self.model, AdaFuseModel):
            if self.model.execution == "switch":
                raise ValueError(
                    'the weights are switched under execution="switch"; set model.execution = "auto" for the engine'
                )
            for bank in self.model.banks.values():
                bank.drop_pack()  # a write through .data shows in nothing that could be checked
        return self._adapted()
