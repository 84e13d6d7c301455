"""What serving an adapter costs on this machine: vLLM with the backbone alone, with ours, with its own LoRAs, under the same load.

    python benchmarks/serve_models.py --model llama-3.1-8b --r 16 64 --out benchmarks/results/h100/serve.json
    python benchmarks/serve_models.py --model llama-2-13b --tensor-parallel 2 --servers ours --in-flight 1 8 32 --prefix tp2/ --out tp.json
    python benchmarks/serve_models.py --model llama-2-13b --servers ours --in-flight 1 8 32 --apart --prefix tp1/ --out tp.json --append
    python benchmarks/serve_models.py --model tiny --r 4 --out tiny.json -- --enforce-eager   # the plumbing, on a CPU

Random weights and a tokenizer of numbers, in `--folder`, where a later run finds them. The servers of a rank run at the same time on the
same GPUs, each with room for its keys and values, or (`--apart`, for all or some) on GPUs of their own, and are loaded in turn
(`serve.py`). `--together` starts those of all ranks at the same time, for which a GPU must have the memory, and the bare ones once. A LoRA
has the rank of all experts of a token; the eight LoRAs are one folder under eight names, and have a copy each on the GPU. What comes
behind `--` goes to all servers.

In parts: rows are written after each number in flight, `--append` adds those of another rank, number or prefix to the file,
`--minutes` leaves out what would begin later, and with `--wait-for` the load begins when others are ready. A server that does not start
is left out, with its errors, and the exit code is 1; the backbone must start. SIGTERM stops the servers, too.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import serve
import torch
from shapes import SHAPES, groups
from whole_models import EXPERTS, TINY, TOP_K, adapted, base_model

SHAPES["tiny"] = {**TINY, "hidden_size": 128}  # heads of 32, the least that vLLM has on a CPU
LORAS = 8
START = 480  # seconds
# The next three say where a difference comes from: vLLM's first model runner, which `ours` takes, or the part that follows the batch. The
# last has `ops.pair` for a few tokens.
SERVERS = (
    "backbone",
    "ours",
    "multilora",
    "backbone_first_runner",
    "ours_adapted_only",
    "ours_second_runner",
    "ours_pair",
)
BARE = ("backbone", "backbone_first_runner")
BLOCK = 16  # tokens of a block of keys and values
# Tokens of a step for which all servers capture graphs: up to 512 those that vLLM takes by itself for 256 requests or more, then further
# ones. Beyond them the host launches kernel by kernel, which takes longer than computing: the prompts of 8 requests that come at once
# took 58 ms with the base of Llama-3.1-8B, captured up to 512, and 143 with ours of r 16 (results/h100/serve.json, 88d411a).
CAPTURED = (1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, 1024, 64), *range(1024, 2049, 128))
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # NVLink multicast, which a program must not take on machines that share their switches.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}


# --- models ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def make_models(name, ranks, folder, loras, device):
    """folder/base; of each rank folder/r16, folder/chosen16.json (the experts of each token id) and folder/lora16. What is there stays."""
    wanted = ["base", *(f"{kind}{r}" for r in ranks for kind in ("r", "lora")[: 1 + loras])]
    if all((folder / each).exists() for each in wanted):
        return
    base = base_model(name, device)  # the same weights every time
    _once(folder / "base", lambda path: _save_base(base, path))
    base.config.name_or_path = base.name_or_path = str(folder / "base")
    for r in ranks:
        _once(folder / f"r{r}", lambda path, r=r: _save_adapter(base, r, path, folder / f"chosen{r}.json"))
        if loras:
            _once(folder / f"lora{r}", lambda path, r=r: make_lora(base, TOP_K * r, path))


def _once(folder, save):
    """save(folder), unless it is there: whole, or not at all."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        start = time.monotonic()
        save(part)
        part.rename(folder)
        print(f"made {folder} in {time.monotonic() - start:.0f} s")


def _save_base(base, folder):
    base.save_pretrained(folder)
    make_tokenizer(base.config.vocab_size).save_pretrained(folder)


def _save_adapter(base, r, folder, chosen):
    hidden, embeddings = base.config.hidden_size, base.get_input_embeddings().weight
    model = adapted(base, r, torch.randn(EXPERTS, hidden, device=embeddings.device) * 2 / hidden**0.5)
    chosen.write_text(json.dumps(model.router.table(model).experts[:, 0].tolist()))
    model.save_pretrained(folder)
    model.detach()


def make_tokenizer(size):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"t{n}": n for n in range(size)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1")


def make_lora(base, r, folder):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules=targets), autocast_adapter_dtype=False)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.normal_(std=0.01)
    model.save_pretrained(folder)
    model.unload()


# --- servers --------------------------------------------------------------------------------------------------------------


class Server(NamedTuple):
    """How one is started, and the names that requests ask for."""

    arguments: list[str]
    names: list[str]
    environment: dict[str, str]


@contextmanager
def running(server, port, log):
    """A server and its workers, in a process group of their own; its output goes to a file."""
    environment = {**ENVIRONMENT, **os.environ, **server.environment}
    command = [sys.executable, *server.arguments, "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is not None:
                print(f"a server has ended, see {log}:\n{errors_in(log.read_text())}")
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                print(f"the server on port {port} did not stop, and is killed")
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers that it left behind would keep the GPU's memory


def starts(process, port, end):
    """Whether a server answers in time; waits for it."""
    while not healthy(port):
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(1)
    return True


def errors_in(text, lines=60):
    """The first lines that name an error, which is the cause of later ones, and the end."""
    named = dict.fromkeys(line for line in text.splitlines() if re.search(r"(Error|Exception): ", line))
    return "\n".join([*list(named)[:5], "...", *text.splitlines()[-lines:]])


def free_ports(count):
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def healthy(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def servers(options, folder, r) -> dict[str, Server]:
    """Those asked for, by the label of their rows; the backbone first."""
    base, kind = str(folder / "base"), "float32" if options.device == "cpu" else "bfloat16"
    shared = ["--dtype", kind, "--max-model-len", str(options.prompt_tokens + options.max_tokens + 8)]
    shared += ["--max-num-seqs", str(max(options.in_flight)), "--tensor-parallel-size", str(options.tensor_parallel)]
    shared += [] if options.device == "cpu" else ["--cudagraph-capture-sizes", *map(str, CAPTURED)]
    # vLLM would take most of the memory, or refuse to start beside another server that holds some.
    shared += ["--kv-cache-memory-bytes", str(kv_bytes(options)), "--gpu-memory-utilization", "0.05", *options.vllm]
    vllm = ["-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--model", base]
    ours = ["-m", "adafuse.cli", "serve", "--base", base, "--adapter", str(folder / f"r{r}"), "--name", "tuned"]
    loras = [f"lora{n}" for n in range(LORAS)]
    more = ["--enable-lora", "--max-loras", str(LORAS), "--max-lora-rank", str(TOP_K * r)]
    more += ["--lora-modules", *(f"{name}={folder / f'lora{r}'}" for name in loras)]
    plain, alone = [*vllm, "--served-model-name", "plain", *shared], ["--adapted-only", "--load-interval", "0"]
    runner = [{"VLLM_USE_V2_MODEL_RUNNER": each} for each in "01"]
    found = {
        "backbone": Server(plain, ["plain"], {}),
        "ours": Server([*ours, *shared], ["tuned"], {}),
        "multilora": Server([*plain, *more], loras, {}),
        "backbone_first_runner": Server(plain, ["plain"], runner[0]),
        "ours_adapted_only": Server([*ours, *alone, *shared], ["tuned"], runner[0]),
        "ours_second_runner": Server([*ours, *shared], ["tuned"], runner[1]),
        "ours_pair": Server([*ours, *shared], ["tuned"], {"ADAFUSE_PAIR_TOKENS": "32"}),
    }
    wanted = {label: found[label] for label in SERVERS if label in ("backbone", *options.servers)}
    if options.apart is None:
        return wanted
    return on_gpus_apart(wanted, options.apart or list(wanted), options.tensor_parallel, visible_gpus())


def on_gpus_apart(wanted, apart, ranks, gpus):
    """The servers, those of `apart` each on the next `ranks` of these GPUs, behind those that the others share. Exits if there are too
    few."""
    together = [label for label in wanted if label not in apart]
    places = [together] * bool(together) + [[label] for label in wanted if label in apart]
    if len(gpus) < ranks * len(places):
        raise SystemExit(
            f"--apart needs {len(places)} times {ranks} GPUs for {', '.join(wanted)}, but there are {len(gpus)}; leave it out, or servers"
        )
    of = {label: ",".join(gpus[ranks * n : ranks * (n + 1)]) for n, place in enumerate(places) for label in place}
    return {
        label: server._replace(environment={**server.environment, "CUDA_VISIBLE_DEVICES": of[label]})
        for label, server in wanted.items()
    }


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]


def kv_bytes(options):
    """Of a rank: room for all requests in flight, and one more."""
    shape = SHAPES[options.model]
    heads = shape["num_key_value_heads"] // options.tensor_parallel
    number = 2 * shape["num_hidden_layers"] * heads * (shape["hidden_size"] // shape["num_attention_heads"])
    size = 4 if options.device == "cpu" else 2
    return size * number * (max(options.in_flight) + 1) * (options.prompt_tokens + options.max_tokens + BLOCK)


# --- load -----------------------------------------------------------------------------------------------------------------


def step_bytes(model, r, ranks=1):
    """What a step reads of weights in 16 bits, on one of the tensor-parallel ranks, for the bound of `serve.py`."""
    shape, blocks = SHAPES[model], SHAPES[model]["num_hidden_layers"]
    linears = [(g.features, width) for g in groups(model, ranks) for width in g.widths]
    head = shape["vocab_size"] * shape["hidden_size"] / ranks
    return {
        "backbone": 2 * (blocks * sum(i * o for i, o in linears) + head),
        # A linear that is split by its inputs has all of B on each rank, one that is split by its outputs all of A.
        "expert": 2 * r * blocks * sum(i + o for i, o in linears),
        "experts": EXPERTS,
        "top_k": TOP_K,
    }


def measure(options, folder, ranks, minutes, append):
    """Writes the rows of these ranks, whose servers run at the same time. The labels of the servers that did not start."""
    of_rank = {r: servers(options, folder, r) for r in ranks}
    wanted = {_place(label, r, ranks): server for r, found in of_rank.items() for label, server in found.items()}
    up, started = {}, time.monotonic()
    with ExitStack() as stack:
        for (place, server), port in zip(wanted.items(), free_ports(len(wanted)), strict=True):
            log = (options.logs or folder) / f"{options.prefix.replace('/', '-')}{place}.log"
            up[place] = stack.enter_context(running(server, port, log)), port
        failed = []
        for place, (process, port) in up.items():
            if not starts(process, port, started + START):
                failed.append(place)
                process.terminate()
        took, names = time.monotonic() - started, " ".join(map(str, ranks))
        print(f"r {names}: servers started in {took:.0f} s" + (f", but not {', '.join(failed)}" if failed else ""))
        if _place("backbone", ranks[0], ranks) in failed:
            raise SystemExit("there is nothing to compare with")
        if options.wait_for:
            print(f"the load begins when {options.wait_for} is there")
            wait_for(options.wait_for)
        for turn, (r, found) in enumerate(of_rank.items()):
            urls = {label: f"http://127.0.0.1:{up[_place(label, r, ranks)][1]}" for label in found}
            running_ones = [label for label in found if _place(label, r, ranks) not in failed]
            models = [model for label in running_ones for model in loads_of(label, found[label].names, urls[label])]
            left = [] if minutes is None else ["--minutes", str(minutes - (time.monotonic() - started) / 60)]
            print(f"r {r}:")
            more = ["--append"] * (append or turn > 0)
            serve.main([*load_arguments(options, folder, r), *left, *more, "--models", *models])
    return failed


def wait_for(path):
    while not path.exists():
        time.sleep(0.5)


def _place(label, r, ranks):
    """The name of a server among those of all ranks: a bare one is started once, for the first."""
    return f"{label}-r{ranks[0] if label in BARE else r}"


def loads_of(label, names, url):
    """Of vLLM's LoRAs two: one of them is asked for, and all in turn."""
    if label != "multilora":
        return [f"{label}={','.join(names)}@{url}"]
    return [f"{label}_1={names[0]}@{url}", f"{label}_{len(names)}={','.join(names)}@{url}"]


def load_arguments(options, folder, r):
    names = ("prompt_tokens", "max_tokens", "rounds", "requests_each", "prefix", "out")
    given = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    case = {"model": options.model, "r": r, "num_experts": EXPERTS, "top_k": TOP_K}
    case["tensor_parallel"] = options.tensor_parallel
    bound = step_bytes(options.model, r, options.tensor_parallel)
    bound |= {"of": [label for label in SERVERS if label.startswith("ours")], "chosen": str(folder / f"chosen{r}.json")}
    given += ["--case", json.dumps(case), "--bound", json.dumps(bound)]
    return [*given, "--vocab", str(SHAPES[options.model]["vocab_size"]), "--in-flight", *map(str, options.in_flight)]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b", help="whose shapes")
    parser.add_argument("--r", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests-each", type=int, default=2, help="requests of a round for each in flight")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument(
        "--apart",
        nargs="*",
        choices=SERVERS,
        help="these servers, or each, on GPUs of their own; the others share the first",
    )
    parser.add_argument("--together", action="store_true", help="start the servers of all ranks at the same time")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=[*SERVERS[:3]], help="beside backbone")
    parser.add_argument("--prefix", default="", help="in front of the rows' names: tp2/")
    parser.add_argument("--folder", type=Path, help="for the models, which stay there; default: a temporary one")
    parser.add_argument("--models-only", action="store_true", help="make the models in --folder, and stop")
    parser.add_argument("--logs", type=Path, help="folder for the servers' output; default: beside the models")
    parser.add_argument("--minutes", type=float, help="ranks and numbers in flight that would begin later are left out")
    parser.add_argument(
        "--wait-for",
        type=Path,
        metavar="FILE",
        help="load the servers only when this file is there: several of these programs, on GPUs of their own, can start at the same time",
    )
    parser.add_argument("--append", action="store_true", help="keep the rows of other cases that the file has")
    parser.add_argument("--out", required=True)
    parser.add_argument("vllm", nargs="*", help="options for all servers, behind --")
    options = parser.parse_args(arguments)
    if options.together and options.apart is not None:
        parser.error(
            "--together puts the servers of all ranks on the same GPUs, --apart on GPUs of their own: choose one"
        )
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(arguments=None):
    options, started, failed = parse(arguments), time.monotonic(), []
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-")))
        folder = folder.resolve() / options.model
        for each in (folder, *filter(None, [options.logs])):
            each.mkdir(parents=True, exist_ok=True)
        make_models(options.model, options.r, folder, "multilora" in options.servers, options.device)
        if options.device == "cuda":
            torch.cuda.empty_cache()
        turns = [options.r] if options.together else [[r] for r in options.r]
        for turn, ranks in enumerate([] if options.models_only else turns):
            left = None if options.minutes is None else options.minutes - (time.monotonic() - started) / 60
            if left is not None and left <= 0:
                print(f"r {' '.join(map(str, ranks))} left out: {options.minutes} minutes are over")
                break
            failed += measure(options, folder, ranks, left, append=options.append or turn > 0)
    if failed:
        raise SystemExit(f"left out: {', '.join(failed)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    main()
