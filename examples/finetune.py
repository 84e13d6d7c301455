"""Fine-tune a mixture of LoRA experts on a JSONL file with the plain HuggingFace Trainer, and look at what it learned.

    python examples/finetune.py HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl adapter

A line of train.jsonl: {"prompt": "How many feet are 3 yards?", "answer": " 9"}
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.data import encode, read_examples
from adafuse.evaluation import position_limit
from adafuse.generation import generate_text
from adafuse.loop import balance_of


def main(base, data, out):
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AdaFuseModel(AutoModelForCausalLM.from_pretrained(base), AdaFuseConfig(r=8, num_experts=8, top_k=2))

    examples = read_examples(data)
    encoded = encode(examples, tokenizer, position_limit(model))
    print(encoded.report() or f"{len(encoded.rows)} examples")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            out, num_train_epochs=1, learning_rate=5e-4, per_device_train_batch_size=8, report_to="none"
        ),
        train_dataset=encoded.rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.save_pretrained(out)

    print("load of the experts:", balance_of(model, encoded.rows)["load"].tolist())
    prompt = examples[0].prompt
    print(prompt + tokenizer.decode(generate_text(model, tokenizer, prompt, max_new_tokens=20)))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
