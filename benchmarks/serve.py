"""Load on an OpenAI server: so many requests in flight at any time, streamed; throughput, time to the first token,
time between tokens.

A closed loop: each of `in_flight` clients sends its next request when its last has ended, until the requests are used
up. Prompts are random token ids, others for each model, round and run, so that no cached prefix helps; every request
generates exactly `max_tokens`. Each round is a sample, but the first, which is for warming up; the models take turns in
every round, so that a drift of the machine hits all alike.

    vllm serve BASE --served-model-name plain --port 8001
    adafuse serve --adapter adapter --name tuned --port 8000
    adafuse bench serve --models plain@http://127.0.0.1:8001 tuned --in-flight 1 8 32 128 --out serve.json

The bare base of an adapted server is no measure of what an adapter costs: its tokens pass the same kernels, with weight 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import record

URL = "http://127.0.0.1:8000"
# Part of a row's name -> unit. ttft: median time to the first token; itl: inter-token latency.
METRICS = {"throughput": "tokens/s", "ttft": "ms", "ttft_p99": "ms", "itl_p50": "ms", "itl_p99": "ms", "errors": ""}


@dataclass
class Load:
    """What a number of requests gave: seconds in all, tokens generated, seconds to first tokens and between tokens,
    errors as text; by the request's place, the ids of its tokens, if it asked for them.
    """

    seconds: float = 0.0
    tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    ids: dict[int, list[int]] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The values of METRICS, but for the errors."""
        return {
            "throughput": self.tokens / self.seconds,
            "ttft": 1e3 * percentile(self.ttft, 50),
            "ttft_p99": 1e3 * percentile(self.ttft, 99),
            "itl_p50": 1e3 * percentile(self.gaps, 50),
            "itl_p99": 1e3 * percentile(self.gaps, 99),
        }


def percentile(values, percent) -> float:
    """NaN of nothing."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def requests(count, *, prompt_tokens, max_tokens, vocab, seed=0) -> list[dict]:
    """Bodies of completions, without a model: random prompts of `prompt_tokens` tokens, exactly `max_tokens` to
    generate.
    """
    source = random.Random(seed)
    options = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return [
        {
            "prompt": [source.randrange(1, vocab) for _ in range(prompt_tokens)],
            **options,
            "stream_options": {"include_usage": True},
        }
        for _ in range(count)
    ]


async def run(url, bodies, *, in_flight, timeout=600.0) -> Load:
    """Send the bodies (each with its model), `in_flight` at a time. A request that fails is an error of the Load,
    never an exception.
    """
    import aiohttp

    load, pending = Load(), enumerate(bodies)
    connector = aiohttp.TCPConnector(limit=in_flight)
    limits = aiohttp.ClientTimeout(total=timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=limits) as session:

        async def client():
            for place, body in pending:  # one iterator for all clients
                try:
                    await _one(session, f"{url}/v1/completions", body, load, place)
                except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
                    load.errors.append(f"{type(error).__name__}: {error}")

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(in_flight)))
        load.seconds = time.perf_counter() - start
    return load


async def _one(session, url, body, load, place):
    start, last, sent, tokens, ids = time.perf_counter(), None, 0, 0, []
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise ValueError(f"status {response.status}: {(await response.text())[:200]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise ValueError(f"error in the stream: {event['error']}")
            if not event.get("choices"):
                sent, tokens = (event["usage"][f"{part}_tokens"] for part in ("prompt", "completion"))
                continue
            ids += event["choices"][0].get("token_ids") or []
            now = time.perf_counter()
            (load.ttft if last is None else load.gaps).append(now - (start if last is None else last))
            last = now
    if (sent, tokens) != (len(body["prompt"]), body["max_tokens"]):
        raise ValueError(
            f"{sent} tokens were read and {tokens} came, not {len(body['prompt'])} and {body['max_tokens']}"
        )
    load.tokens += tokens
    if ids:
        load.ids[place] = ids


def parse_model(text) -> tuple[str, list[str], str]:
    """(the name in the rows, the models that requests ask for in turn, URL or "") of LABEL=NAME,NAME@URL."""
    models, _, url = text.partition("@")
    label, given, names = models.partition("=")
    return label, names.split(",") if given else [label], url


def experts_a_step(sizes, in_flight, ids) -> float:
    """Of so many experts a step of `in_flight` requests reads: those that its tokens choose, each counted once.

    sizes: of --bound. ids: tokens of requests in the order in which they were sent. Requests of one length that are sent together stay
    together, so the tokens at one place of `in_flight` requests are those of a step. Without ids, or where it is not known what each token
    chooses: the mean if each expert is as likely.
    """
    fed = [tokens[:-1] for tokens in ids]  # the last of a request is not fed back
    waves = [fed[first : first + in_flight] for first in range(0, len(fed) - in_flight + 1, in_flight)]
    steps = [step for wave in waves for step in zip(*wave, strict=True)]
    if not steps or "chosen" not in sizes:
        return sizes["experts"] * (1 - (1 - sizes["top_k"] / sizes["experts"]) ** in_flight)
    chosen = json.loads(Path(sizes["chosen"]).read_text())
    return statistics.mean(len({expert for token in step for expert in chosen[token]}) for step in steps)


def bound(sizes, experts) -> float:
    """Throughput with experts over that of the backbone alone, if a step took the time of the weights that it reads: those of the
    backbone / (those and the experts')."""
    return sizes["backbone"] / (sizes["backbone"] + experts * sizes["expert"])


def measure(options):
    """Write a row for each model, number in flight and metric; after each number, should the machine be taken away. The first model is
    what the others are compared with."""
    rows, loads, ids = [], {}, {}  # by model and number in flight: of the rounds; of the first, for warming up
    failed = Counter()  # requests, of all rounds
    started, run_id = time.monotonic(), time.time_ns()
    env = {**record.environment(), "vllm": version(parse_model(options.models[0])[2] or options.url)}
    for in_flight in options.in_flight:
        if options.minutes is not None and time.monotonic() > started + 60 * options.minutes:
            print(f"{in_flight} in flight left out: {options.minutes:.1f} minutes are over")
            break
        for turn in range(options.rounds + 1):
            for model in options.models:
                load = _load(model, in_flight, options, turn, seed=f"{run_id} {in_flight} {turn} {model}")
                key = parse_model(model)[0], in_flight
                failed[key] += len(load.errors)
                if turn:
                    loads.setdefault(key, []).append(load.metrics())
                else:
                    ids[key] = [load.ids[place] for place in sorted(load.ids)]
        rows += (
            new := [
                row for key in loads if key[1] == in_flight for row in _rows(loads, key, ids[key], failed[key], options)
            ]
        )
        with record.alone(options.out):
            known = record.appended(options.out, rows, _place, env) if options.append else rows
            record.write(options.out, known, env, shown=new)
        for row in new:
            if "bound" in row and row["ratio"]:
                print(
                    f"{row['name']}, {in_flight} in flight: {row['ratio']:.3f} of the backbone, bound {row['bound']:.3f}"
                )
    if total := sum(failed.values()):
        raise SystemExit(f"{total} requests failed: rows of a load with errors are not to be compared")


def _load(model, in_flight, options, turn, seed) -> Load:
    """One round of a model. The first is for warming up: its requests ask for the ids of their tokens too."""
    _, names, url = parse_model(model)
    count = max(in_flight, min(options.requests, options.requests_each * in_flight))
    sizes = {"prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens, "vocab": options.vocab}
    bodies = requests(count, **sizes, seed=seed)
    more = {"return_token_ids": True} if not turn and "chosen" in options.bound else {}
    # Where the round before ended, so that few requests a round ask for all names too.
    asked = [{**body, **more, "model": names[(turn * count + i) % len(names)]} for i, body in enumerate(bodies)]
    load = asyncio.run(run(url or options.url, asked, in_flight=in_flight))
    for error in load.errors[:3]:
        print(f"{model}: {error}")
    if not load.tokens:
        raise SystemExit(f"{model}: none of {len(asked)} requests was answered: {load.errors[0]}")
    return load


def version(url) -> str:
    """Of the vLLM that answers there."""
    try:
        with urllib.request.urlopen(f"{url}/version", timeout=30) as answer:
            return json.load(answer)["version"]
    except (OSError, ValueError, KeyError):
        return "unknown"


def _place(row):
    """All models of a case come from one run: they took turns, and are compared with the first of that run."""
    return row["name"].split("/")[:-2], row["case"]


def _rows(loads, key, ids, failed, options):
    name, in_flight = key
    sizes = {"in_flight": in_flight, "prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens}
    case = {**sizes, "domain": "random", **options.case}
    first = parse_model(options.models[0])[0]
    for metric, unit in METRICS.items():
        if metric == "errors":
            # All of them, since a median would hide those of one round; no ratio, for there should be none.
            yield record.row(f"{options.prefix}{metric}/{name}", case, [float(failed)] * 2, unit)
            continue
        mine, firsts = ([values[metric] for values in loads[each, in_flight]] for each in (name, first))
        against = None if name == first else record.row(f"{options.prefix}{metric}/{first}", case, firsts, unit)
        row = record.row(f"{options.prefix}{metric}/{name}", case, mine, unit, vs=against)
        if metric == "throughput" and name in options.bound.get("of", ()):
            experts = experts_a_step(options.bound, in_flight, ids)
            row |= {"bound": bound(options.bound, experts), "experts_a_step": experts}
        yield row


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default=URL)
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        help="NAME or NAME@URL of a server's model, or LABEL=NAME,NAME@URL: requests ask for these in turn; the first is compared with",
    )
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--requests", type=int, default=256, help="at most so many requests a round")
    parser.add_argument("--requests-each", type=int, default=8, help="and so many for each in flight")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=30000, help="prompts are of token ids below this")
    parser.add_argument(
        "--case", type=json.loads, default={}, help='JSON that goes into each case: {"model": "llama-2-7b", "r": 16}'
    )
    parser.add_argument(
        "--bound",
        type=json.loads,
        default={},
        help="JSON: of which models throughput has a bound, and bytes that a step reads: "
        '{"of": ["tuned"], "backbone": 1.5e10, "expert": 8.4e7, "experts": 8, "top_k": 2, "chosen": FILE}; '
        "FILE, which may be left out: JSON, a list of experts for each token id",
    )
    parser.add_argument("--prefix", default="", help="in front of the rows' names: tp2/")
    parser.add_argument("--minutes", type=float, help="numbers in flight that would begin later are left out")
    parser.add_argument("--append", action="store_true", help="keep the rows of other cases that the file has")
    parser.add_argument("--out", required=True)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    if options.rounds < 2:
        raise SystemExit("--rounds must be 2 or more: a row needs a median and percentiles")
    measure(options)


if __name__ == "__main__":
    main()
