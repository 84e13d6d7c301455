"""Training step (forward, backward, AdamW) of a mixture in reference execution, against PEFT LoRA of the same total rank E * r.

Both on the same bf16 base with random weights, fp32 adapters under bf16 autocast (what Trainer's bf16=True does), eager, all
linears, the same random tokens. The contestants take turns in every round, so that a drift of the clock hits all alike.

    python benchmarks/train_step.py --out benchmarks/results/h100/train_step.json
"""

import argparse
import gc

import record
import torch
from peft import LoraConfig, get_peft_model
from shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel

# model, batch, tokens a sequence, gradient checkpointing
CASES = (
    ("llama-3.2-1b", 4, 512, False),
    ("llama-3.2-1b", 8, 1024, False),
    ("llama-2-7b", 4, 512, False),
    ("llama-2-7b", 8, 1024, True),
)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOTAL_RANK = 64
# name -> settings of the mixture; E * r is TOTAL_RANK in all
MIXTURES = {
    "train_step/model_E8_r8": {"num_experts": 8, "r": 8, "top_k": 2, "routing": "model"},
    "train_step/layer_E8_r8": {"num_experts": 8, "r": 8, "top_k": 2, "routing": "layer"},
    "train_step/layer_E64_r1": {"num_experts": 64, "r": 1, "top_k": 16, "routing": "layer"},
}


def base_model(shape):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, use_cache=False))
    finally:
        torch.set_default_dtype(torch.float32)


def lora(base):
    return get_peft_model(
        base, LoraConfig(r=TOTAL_RANK, lora_alpha=2 * TOTAL_RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    )


class Step:
    """One contestant: its model, its optimizer, its timings in ms. Built and dropped per case, one in memory at a time."""

    def __init__(self, model, checkpointing):
        self.model = model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def run(self, ids):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def time(self, ids):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run(ids)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def contestants():
    yield "train_step/lora_r64", lora
    for name, settings in MIXTURES.items():
        yield name, lambda base, settings=settings: AdaFuseModel(base, AdaFuseConfig(**settings))


def measure(shape, batch, seq, checkpointing, steps, rounds):
    """Rounds of `steps` timed steps, each contestant once a round on a fresh base; the samples of all rounds together."""
    samples = {name: [] for name, _ in contestants()}
    memory = {}
    for _ in range(rounds):
        for name, build in contestants():
            torch.cuda.reset_peak_memory_stats()
            step = Step(build(base_model(shape)), checkpointing)
            batches = torch.randint(0, SHAPES[shape]["vocab_size"], (steps, batch, seq), device="cuda")
            for ids in batches[:3]:
                assert torch.isfinite(step.run(ids))
            samples[name] += [step.time(ids) for ids in batches]
            memory[name] = torch.cuda.max_memory_allocated() / 2**30
            del step
            gc.collect()
            torch.cuda.empty_cache()
    case = {"model": shape, "batch": batch, "tokens": batch * seq, "checkpointing": checkpointing}
    rows = []
    for name, values in samples.items():
        mixture = MIXTURES.get(name, {"r": TOTAL_RANK})
        rows.append(
            record.row(
                name,
                {**case, **mixture, "peak_gib": round(memory[name], 2)},
                values,
                "ms",
                vs=rows[0] if rows else None,
            )
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=15, help="timed steps a contestant and round")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    rows = [row for case in CASES for row in measure(*case, args.steps, args.rounds)]
    record.write(args.out, rows)


if __name__ == "__main__":
    main()
