"""The command line: parses arguments, calls one function a command, and turns a user's error into one line and exit code 1."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Mixtures of LoRA experts with one routing decision per token, on any HuggingFace causal LM.\n\n"
    "Start with [bold]adafuse demo[/] (trains a small adapter on this machine), then [bold]adafuse train --help[/].",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)

Base = Annotated[
    str | None, typer.Option(help="Base model: a HuggingFace folder or hub id. Default: the one the adapter names.")
]
Adapter = Annotated[Path, typer.Option(help="Adapter folder, as `adafuse train` writes it.")]
Dtype = Annotated[str, typer.Option(help="auto (as the files say), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Quantize = Annotated[str | None, typer.Option(help="4bit (NF4) or 8bit base, by bitsandbytes (QLoRA style).")]
Chat = Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")]


def _print_version(asked: bool):
    if asked:
        from adafuse import __version__

        typer.echo(f"adafuse {__version__}")
        raise typer.Exit


@app.callback()
def _quiet(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
):
    # Libraries' notices about themselves would bury what a command says.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    for name in ("torchao", "torch.utils._pytree", "transformers", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@app.command(epilog="Example: adafuse train --base ./SmolLM2 --data train.jsonl --out ./adapter --num-experts 8 --r 16")
def train(
    data: Annotated[
        Path, typer.Option(help='JSONL: {"prompt", "answer"} or {"messages": [...]} a line. Loss on the answers only.')
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter (and for checkpoints, with --save-every).")],
    base: Annotated[str, typer.Option(help="Base model: a HuggingFace folder or hub id.")],
    eval_data: Annotated[
        Path | None, typer.Option(help="JSONL for the eval loss. Default: 5 % of --data is held out.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Go on from this adapter instead of a fresh one.")] = None,
    experts: Annotated[
        list[Path] | None,
        typer.Option(help="PEFT LoRA folder that becomes one expert; repeat it. Best with --only router."),
    ] = None,
    only: Annotated[str, typer.Option(help="What trains: all, router (over frozen experts) or experts.")] = "all",
    r: Annotated[int | None, typer.Option(help="Rank of an expert. [default: 16]")] = None,
    num_experts: Annotated[int | None, typer.Option(help="Experts per linear. [default: 8]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token uses. [default: 2]")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Experts are scaled by alpha / r. [default: 2 r]")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Dropout on the adapters' input. [default: 0]")] = None,
    shared_rank: Annotated[
        int | None, typer.Option(help="Rank of an expert all tokens share; 0: none. [default: 0]")
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(help="model (one decision a token) or layer (one a token and block). [default: model]"),
    ] = None,
    router_hidden: Annotated[
        int | None, typer.Option(help="Hidden width of the router; 0: linear. [default: 0]")
    ] = None,
    aux_loss_coef: Annotated[float | None, typer.Option(help="Weight of the balance loss. [default: 0.01]")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Adapt linears whose name ends so (q_proj); repeat it. Default: all.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimisation steps; 0: as many as --epochs take.")] = 0,
    epochs: Annotated[float, typer.Option(help="Times each example is seen.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Examples a micro-batch.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Micro-batches a step.")] = 1,
    learning_rate: Annotated[
        float, typer.Option(help="The highest: 5 % of the steps lead up to it, the rest down to 0.")
    ] = 2e-4,
    max_length: Annotated[
        int | None, typer.Option(help="Longest example in tokens; longer ones are left out and counted.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision (GPUs).")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a slower step.")
    ] = False,
    eval_every: Annotated[int, typer.Option(help="Steps between eval losses; 0: at the end only.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints to resume from; 0: none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Of the adapter's first weights and the order of the examples.")] = 0,
    chat: Chat = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
):
    """Train a dynamic adapter on a JSONL file and save it."""
    from adafuse.config import AdaFuseConfig
    from adafuse.training import TrainSettings, run_training

    names = [
        "r",
        "num_experts",
        "top_k",
        "lora_alpha",
        "lora_dropout",
        "shared_rank",
        "routing",
        "router_hidden",
        "aux_loss_coef",
    ]
    values = locals()
    config = {name: values[name] for name in names if values[name] is not None}
    if target:
        config["target_modules"] = target
    if adapter and (config or experts):
        raise typer.BadParameter(f"--adapter brings its own settings; leave out {', '.join(config) or '--experts'}")
    run_training(
        base,
        data,
        out,
        config=config if experts else AdaFuseConfig(**config),
        settings=TrainSettings(
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            seed=seed,
            only=only,
            max_length=max_length,
            chat=chat,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            eval_every=eval_every,
            save_every=save_every,
        ),
        eval_file=eval_data,
        adapter=adapter,
        experts=experts,
        resume=resume,
        overwrite=overwrite,
        dtype=dtype,
        device=device,
        quantize=quantize,
    )


@app.command("eval", epilog="Example: adafuse eval --adapter ./adapter --data choices.jsonl")
def evaluate(
    data: Annotated[
        Path, typer.Option(help='JSONL: {"prompt", "choices": [...], "answer": index, "domain" (optional)} a line.')
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder; without it the base alone is evaluated.")
    ] = None,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(help="Choices scored at once.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
    chat: Chat = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
):
    """Accuracy (by mean log-likelihood per answer token) and NLL on multiple-choice items, by domain."""
    from adafuse.evaluation import run_evaluation

    if adapter is None and base is None:
        raise typer.BadParameter("name what to evaluate: --adapter, or --base for the base alone")
    run_evaluation(
        data, adapter, base, batch_size=batch_size, out=out, chat=chat, dtype=dtype, device=device, quantize=quantize
    )


@app.command(
    epilog='Example: adafuse generate --adapter ./adapter --prompt "How many feet are 3 yards?" --chat --show-experts'
)
def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Option(help="The prompt; - reads it from standard input.")],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the fewest tokens that have this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling: the same seed gives the same text.")] = 0,
    show_experts: Annotated[
        bool, typer.Option("--show-experts", help="Colour each token by its first expert.")
    ] = False,
    chat: Chat = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
):
    """Generate text with an adapted model."""
    from adafuse.generation import run_generation

    prompt = sys.stdin.read() if prompt == "-" else prompt
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "chat": chat}
    load = {"dtype": dtype, "device": device, "quantize": quantize}
    run_generation(adapter, base, prompt, seed=seed, show_experts=show_experts, load=load, **options)


@app.command(epilog="Example: adafuse inspect --adapter ./adapter --text README.md --out page.html")
def inspect(
    adapter: Adapter,
    text: Annotated[Path, typer.Option(help="Text file to look at.")],
    out: Annotated[Path, typer.Option(help="HTML page to write.")],
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
):
    """Write a page that shows which experts the tokens of a text choose, and how the load is shared."""
    from adafuse.page import run_inspection

    run_inspection(adapter, text, out, base=base, dtype=dtype, device=device)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter that the demo trains.")] = Path("adafuse-demo"),
    seed: Annotated[int, typer.Option(help="Of the questions and the training.")] = 0,
):
    """Train an adapter for SmolLM2-135M on three small tasks and show what it learned (under five minutes on two cores)."""
    from adafuse.demo.run import run_demo

    run_demo(out=out, seed=seed)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: adafuse serve --adapter ./adapter --port 8000 --max-model-len 4096",
)
def serve(
    context: typer.Context,
    adapter: Adapter,
    base: Base = None,
    name: Annotated[
        str | None, typer.Option(help="Model name of the base with the adapter. Default: the folder's.")
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="Model name of the bare base. Default: what --base says.")
    ] = None,
    adapted_only: Annotated[bool, typer.Option("--adapted-only", help="Do not offer the bare base.")] = False,
    load_interval: Annotated[float, typer.Option(help="Seconds between reports of the experts' load; 0: none.")] = 60.0,
):
    """Serve a base with an adapter, and without, over vLLM's OpenAI API, on 127.0.0.1. Further options go to vLLM's server."""
    from adafuse.serve import run_server

    names = {"name": name, "base_name": base_name, "adapted_only": adapted_only}
    run_server(adapter, base, **names, load_interval=load_interval, options=context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A script of benchmarks/ in a clone of the project: train_step, ...")],
):
    """Run a benchmark of the project's repository; further arguments go to it."""
    import runpy

    # A script whose name is a package's too has the prefix: scripts come before packages on the path.
    names = (f"{name}.py", f"bench_{name}.py")
    script = next((path for path in map(Path("benchmarks").joinpath, names) if path.is_file()), None)
    if script is None:
        raise ValueError(
            f"{Path('benchmarks') / names[0]} is not here; run this in a clone of the repository, whose benchmarks/ holds the scripts"
        )
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *context.args]
    runpy.run_path(str(script), run_name="__main__")


def main():
    """Entry point: 0 done, 1 failed with one line on stderr, 2 wrong usage."""
    try:
        app()
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        # torch says so in two ways, on a GPU and on a CPU; what else is a RuntimeError is a fault of ours, to be seen in full.
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        print(
            "error: out of memory; try a smaller --batch-size, --r or --num-experts, or --quantize 4bit",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
