"""An engine of vLLM's in this process, and what it makes of prompts."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an engine here costs two seconds, in a process of its own thirty
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # which not every machine has; requests here are greedy

from vllm import LLM, SamplingParams

from adafuse.integrations.vllm import llm_options
from adafuse.integrations.vllm.names import BARE, SALTS

TOKENS = 24
REQUESTS = "adafuse.integrations.vllm.requests:Requests"


@contextmanager
def engine(base, adapter, **options):
    """vLLM with the adapter, by what `llm_options` says."""
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, **options}
    llm = LLM(**{**llm_options(base, adapter), **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def texts(llm, prompts, tokens=TOKENS, bare=()):
    """[(ids, log-probabilities)] of greedy continuations, all prompts in one batch. bare: the places of those without
    adapter.
    """
    requests, params = [], []
    for place, prompt in enumerate(prompts):
        alone = place in bare
        requests.append({"prompt_token_ids": prompt, **({"cache_salt": SALTS[True]} if alone else {})})
        extra = {BARE: 1} if alone else None
        params.append(SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, extra_args=extra))
    found = []
    for output in llm.generate(requests, params, use_tqdm=False):
        answer = output.outputs[0]
        ids = list(answer.token_ids)
        found.append((ids, [step[token].logprob for step, token in zip(answer.logprobs, ids, strict=True)]))
    return found


def compare(found, expected, tolerance=1e-4):
    """Texts equal, log-probabilities within the tolerance."""
    for place, ((ids, logprobs), (right, right_logprobs)) in enumerate(zip(found, expected, strict=True)):
        assert ids == right, f"prompt {place}: {ids} is not {right}"
        worst = max(abs(one - other) for one, other in zip(logprobs, right_logprobs, strict=True))
        assert worst < tolerance, f"prompt {place}: log-probabilities differ by {worst}"
