"""Small texts to train on: a tokenizer made on the spot, encoded rows, and collation with as much padding as a test wants."""

from __future__ import annotations

import json

import torch
from families import PAD, VOCAB, family
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<eos>"
IGNORED = -100
# {% generation %} marks the answers for TRL's assistant_only_loss; everyone else ignores it.
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    + EOS
    + "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens, 257 with the end token, which pads too (as for many real models): ids 0 (the end) to 256."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([], trainers.BpeTrainer(vocab_size=257, special_tokens=[EOS], initial_alphabet=alphabet))
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)
    made.chat_template = CHAT_TEMPLATE if chat else None
    return made


def rows(count: int, seed: int = 0, shortest: int = 5, longest: int = 12) -> list[dict[str, list[int]]]:
    """Rows of random tokens, of unequal lengths, whose second half is a function of the first: there is something to learn.

    Labels on a part of each row only, so that the numbers of label tokens differ from row to row.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        ids = torch.randint(1, VOCAB - 3, (length,), generator=generator)
        ids[length // 2 :] = ids[: length - length // 2].flip(0) % 7 + 1
        labels = ids.clone()
        labels[: length // 2] = IGNORED
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def collate(rows, extra: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """Rows to a batch, padded to the longest plus `extra`, at the end or (left) in front."""
    width = max(len(row["input_ids"]) for row in rows) + extra

    def pad(values, value):
        missing = [value] * (width - len(values))
        return missing + list(values) if left else list(values) + missing

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], PAD) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], IGNORED) for row in rows]),
    }


def save_base(folder, *, chat: bool = False, positions: int = 64, **changes):
    """A folder with a tiny random Llama for `tokenizer()` and that tokenizer: what `--base` names. changes: to its config."""
    settings = {
        **family("llama").build().config.to_dict(),
        "vocab_size": 257,
        "max_position_embeddings": positions,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**settings))
    base.save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def sums(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and answers of one task: adding two digits."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, 10, (count, 2), generator=generator).tolist()
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
