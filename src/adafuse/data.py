"""Data: JSON lines of prompt and answer, or of chat messages, to token ids with labels on the answers only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError

IGNORED = -100  # the label of a token the loss leaves out


@dataclass(frozen=True)
class Example:
    """One line of a data file: chat messages, or a plain prompt with its answer. `line` is its number in the file, from 1."""

    line: int
    prompt: str = ""
    answer: str = ""
    messages: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples: rows of {"input_ids", "labels"} (lists of int), and the lines left out for being too long."""

    rows: list[dict]
    too_long: list[int]
    max_length: int | None

    def report(self) -> str:
        """One line on what was left out; empty if nothing was."""
        if not self.too_long:
            return ""
        lines = ", ".join(map(str, self.too_long[:5])) + (", ..." if len(self.too_long) > 5 else "")
        total = len(self.rows) + len(self.too_long)
        return f"{len(self.too_long)} of {total} examples are longer than {self.max_length} tokens and were left out (lines {lines})"


def read_jsonl(path) -> list[tuple[int, dict]]:
    """(line number, object) of each non-blank line. ValueError for a missing or empty file, and for a broken line, by number."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    records = []
    with path.open("rb") as file:  # as bytes, so that a line that is not UTF-8 can be named
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text ({error})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: broken JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
            records.append((number, record))
    if not records:
        raise ValueError(f"{path} is empty: it has no line with an example")
    return records


def read_examples(path) -> list[Example]:
    """Examples of a JSONL file whose lines are {"prompt": ..., "answer": ...} or {"messages": [{"role": ..., "content": ...}, ...]}."""
    return [_example(f"{path}, line {number}", number, record) for number, record in read_jsonl(path)]


def _example(where, number, record):
    if "messages" in record:
        return Example(number, messages=_messages(where, record["messages"]))
    if not {"prompt", "answer"} <= set(record):
        raise ValueError(f'{where}: expected the keys "prompt" and "answer", or "messages"; found {sorted(record)}')
    prompt, answer = record["prompt"], record["answer"]
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise ValueError(f"{where}: prompt and answer must be strings")
    if not answer.strip():
        raise ValueError(f"{where}: the answer is empty, so there is nothing to learn from")
    return Example(number, prompt, answer)


def _messages(where, messages):
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    ):
        raise ValueError(f'{where}: "messages" must be a list of objects with "role" and "content"')
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{where}: no message of the assistant, so there is nothing to learn from")
    if any(not isinstance(m["content"], str) or not m["content"].strip() for m in answers):
        raise ValueError(f"{where}: an answer of the assistant is empty or not a string")
    return tuple(messages)


def encode(examples, tokenizer, max_length: int | None, chat: bool = False) -> Encoded:
    """Token ids of each example; labels are the ids of the answers (and of the end of each), IGNORED elsewhere.

    A plain prompt and its answer are tokenised apart and put together as they are: `prompt_ids`, the answer, EOS. chat: the
    prompt becomes a user turn of the tokenizer's chat template, as messages always do. Examples over max_length tokens (None:
    any length will do) are left out and counted, never cut. ValueError if none is left.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end answers with; set tokenizer.eos_token")
    rows, too_long = [], []
    for example in examples:
        ids, labels = _encode_one(example, tokenizer, chat)
        if max_length is not None and len(ids) > max_length:
            too_long.append(example.line)
        else:
            rows.append({"input_ids": ids, "labels": labels})
    encoded = Encoded(rows, too_long, max_length)
    if not rows:
        raise ValueError(f"no example is left to use: {encoded.report()}")
    return encoded


def prompt_ids(tokenizer, prompt: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt: the tokenizer's BOS if it adds one, then the text; no EOS that it adds.

    An empty prompt becomes the BOS token, or the EOS token of a tokenizer that adds none, as in lm-eval. chat: the prompt is the
    user's turn, followed by the head of the assistant's.
    """
    if chat:
        return _template(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    encoding = tokenizer(prompt, return_special_tokens_mask=True)
    ids, added = encoding.input_ids, encoding.special_tokens_mask
    if len(ids) > 1 and added[-1]:  # some tokenizers end every text
        ids = ids[:-1]
    if ids:
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError(
            "a prompt is empty and the tokenizer has neither BOS nor EOS to start from; prompts need a text here"
        )
    return [start]


def _encode_one(example, tokenizer, chat):
    if example.messages:
        return _encode_chat(example, list(example.messages), tokenizer)
    if chat:
        turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
        return _encode_chat(example, turns, tokenizer)
    prompt = prompt_ids(tokenizer, example.prompt)
    answer = [*tokenizer(example.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def _encode_chat(example, messages, tokenizer):
    """Ids of the whole conversation; each assistant turn is found as what it adds to the conversation before it."""
    try:
        whole = _template(tokenizer, messages)
        labels = [IGNORED] * len(whole)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _template(tokenizer, messages[:index], add_generation_prompt=True) if index else []
            after = _template(tokenizer, messages[: index + 1])
            if whole[: len(before)] != before or whole[: len(after)] != after:
                raise ValueError(
                    f"line {example.line}: the chat template rewrites earlier turns, so the answers cannot be told from the "
                    "prompts; use one question and answer an example"
                )
            labels[len(before) : len(after)] = after[len(before) :]
    except TemplateError as error:  # roles it does not know, or not in the order it wants
        raise ValueError(f"line {example.line}: the chat template refuses these messages: {error}") from error
    if not any(label != IGNORED for label in labels[1:]):
        raise ValueError(f"line {example.line}: the chat template drops the answers, so there is nothing to learn from")
    return whole, labels


def _template(tokenizer, messages, **options):
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, which messages and chat=True (--chat) need; use plain prompts, or set "
            "tokenizer.chat_template"
        )
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])
