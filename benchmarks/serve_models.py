"""What serving an adapter costs on this machine: vLLM with the backbone alone, with ours, with its own LoRAs, under the same load.

    python benchmarks/serve_models.py --model llama-3.1-8b --r 16 64 --out benchmarks/results/h100/serve.json
    python benchmarks/serve_models.py --model llama-2-13b --tensor-parallel 2 --without-loras --prefix tp2/ --out tp2.json

Random weights and a tokenizer of numbers, in `--folder` (twice the weights must fit). The servers of a rank run at the same time on the
same GPUs, each with room for its keys and values, and are loaded in turn (`serve.py`). A LoRA has the rank of all experts of a token.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import record
import serve
import torch
from shapes import SHAPES, groups
from whole_models import EXPERTS, TINY, TOP_K, adapted, base_model

SHAPES["tiny"] = {**TINY, "hidden_size": 128}  # heads of 32, the least that vLLM has on a CPU
LORAS = 8
PORT = 8100
START = 400  # seconds


# --- models ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def make_models(name, ranks, folder, loras, device):
    """folder/base, folder/r16, ..., folder/lora16_0, ... : what the servers read."""
    base = base_model(name, device)
    base.save_pretrained(folder / "base")
    make_tokenizer(base.config.vocab_size).save_pretrained(folder / "base")
    base.config.name_or_path = base.name_or_path = str(folder / "base")
    for r in ranks:
        router = torch.randn(EXPERTS, base.config.hidden_size, device=device) * 2 / base.config.hidden_size**0.5
        model = adapted(base, r, router)
        model.save_pretrained(folder / f"r{r}")
        model.detach()
        if loras:
            make_loras(base, TOP_K * r, folder / f"lora{r}_0")
            for n in range(1, LORAS):
                shutil.copytree(folder / f"lora{r}_0", folder / f"lora{r}_{n}")


def make_tokenizer(size):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"t{n}": n for n in range(size)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1")


def make_loras(base, r, folder):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules=targets), autocast_adapter_dtype=False)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.normal_(std=0.01)
    model.save_pretrained(folder)
    model.unload()


# --- servers --------------------------------------------------------------------------------------------------------------


@contextmanager
def server(arguments, port, log):
    """A server of its own process; its output goes to a file."""
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *arguments, "--port", str(port)], stdout=output, stderr=output)
        try:
            yield process, port, log
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(servers):
    """SystemExit with the end of its output for one that does not start."""
    end = time.monotonic() + START
    for process, port, log in servers:
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server on port {port} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(1)


def healthy(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def commands(options, folder, r):
    """{label of the rows: (command, names that requests ask for)}."""
    base, kind = str(folder / "base"), "float32" if options.device == "cpu" else "bfloat16"
    shared = ["--dtype", kind, "--max-model-len", str(options.prompt_tokens + options.max_tokens + 8), *options.vllm]
    shared += ["--max-num-seqs", str(max(options.in_flight)), "--tensor-parallel-size", str(options.tensor_parallel)]
    if options.device != "cpu":
        shared += ["--kv-cache-memory-bytes", str(kv_bytes(options))]
    vllm = ["-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--model", base]
    ours = ["-m", "adafuse.cli", "serve", "--base", base, "--adapter", str(folder / f"r{r}"), "--name", "tuned"]
    found = {
        "backbone": ([*vllm, "--served-model-name", "plain", *shared], ["plain"]),
        "ours": ([*ours, *shared], ["tuned"]),
    }
    if options.loras:
        loras = [f"lora{n}={folder / f'lora{r}_{n}'}" for n in range(LORAS)]
        more = ["--enable-lora", "--max-loras", str(LORAS), "--max-lora-rank", str(TOP_K * r), "--lora-modules", *loras]
        found["multilora"] = (
            [*vllm, "--served-model-name", "base", *shared, *more],
            [f"lora{n}" for n in range(LORAS)],
        )
    return found


def kv_bytes(options):
    """Of a rank: room for all requests in flight, and a tenth more."""
    shape = SHAPES[options.model]
    heads = shape["num_key_value_heads"] // options.tensor_parallel
    number = 2 * shape["num_hidden_layers"] * heads * (shape["hidden_size"] // shape["num_attention_heads"])
    return int(1.1 * 2 * number * max(options.in_flight) * (options.prompt_tokens + options.max_tokens + 16))


# --- load -----------------------------------------------------------------------------------------------------------------


def step_bytes(model, r):
    """What a step reads of weights in 16 bits, for the bound of `serve.py`."""
    shape, blocks = SHAPES[model], SHAPES[model]["num_hidden_layers"]
    linears = [(g.features, width) for g in groups(model) for width in g.widths]
    head = shape["vocab_size"] * shape["hidden_size"]
    return {
        "backbone": 2 * (blocks * sum(i * o for i, o in linears) + head),
        "expert": 2 * r * blocks * sum(i + o for i, o in linears),
        "experts": EXPERTS,
        "top_k": TOP_K,
    }


def measure(options, folder, r):
    """The rows of one rank."""
    found, out = commands(options, folder, r), folder / f"rows{r}.json"
    with ExitStack() as stack:
        running = [
            stack.enter_context(server(command, PORT + n, folder / f"{label}.log"))
            for n, (label, (command, _)) in enumerate(found.items())
        ]
        wait_for(running)
        models = []
        for (label, (_, names)), (_, port, _) in zip(found.items(), running, strict=True):
            url = f"http://127.0.0.1:{port}"
            if label == "multilora":
                models += [f"{label}_1={names[0]}@{url}", f"{label}_{len(names)}={','.join(names)}@{url}"]
            else:
                models.append(f"{label}={','.join(names)}@{url}")
        sizes = ("prompt_tokens", "max_tokens", "rounds", "requests_each")
        given = [text for name in sizes for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
        case = {"model": options.model, "r": r, "num_experts": EXPERTS, "top_k": TOP_K}
        given += ["--case", json.dumps(case), "--bound", json.dumps(step_bytes(options.model, r))]
        given += ["--vocab", str(SHAPES[options.model]["vocab_size"]), "--prefix", options.prefix, "--out", str(out)]
        serve.main([*given, "--in-flight", *map(str, options.in_flight), "--models", *models])
    return json.loads(out.read_text())["rows"]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b", help="whose shapes")
    parser.add_argument("--r", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests-each", type=int, default=2, help="requests of a round for each in flight")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--without-loras", dest="loras", action="store_false", help="leave vLLM's own LoRAs out")
    parser.add_argument("--prefix", default="", help="in front of the rows' names: tp2/")
    parser.add_argument("--folder", type=Path, help="for the models; default: a temporary one")
    parser.add_argument("--vllm", nargs="*", default=[], help="further options for all servers, after --vllm= or last")
    parser.add_argument("--out", required=True)
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(arguments=None):
    options = parse(arguments)
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-")))
        make_models(options.model, options.r, folder, options.loras, options.device)
        if options.device == "cuda":
            torch.cuda.empty_cache()
        rows = []
        for r in options.r:
            rows += measure(options, folder, r)
            record.write(options.out, rows)


if __name__ == "__main__":
    main()
