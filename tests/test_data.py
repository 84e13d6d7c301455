"""Data files: what is read, what is refused (by line), and which tokens get a label."""

import json

import pytest
from tiny_text import EOS, IGNORED, sums, tokenizer, write_jsonl
from tokenizers import processors

from adafuse.data import Example, encode, prompt_ids, read_examples, read_jsonl

USER, ASSISTANT = "user", "assistant"


def turn(role, content):
    return {"role": role, "content": content}


def chat(*contents):
    """Turns of user and assistant in alternation."""
    return [turn(ASSISTANT if index % 2 else USER, content) for index, content in enumerate(contents)]


def labelled(row, words):
    """The text of each run of tokens with a label."""
    runs, before = [], IGNORED
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(token)
        before = label
    return [words.decode(run) for run in runs]


def test_examples_keep_their_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        json.dumps({"prompt": "1+1=", "answer": "2", "domain": "sums"}),
        "",
        json.dumps({"messages": chat("hi", "yes")}),
    ]
    path.write_text("\n".join(lines))
    first, second = read_examples(path)
    assert first == Example(1, "1+1=", "2")
    assert (second.line, list(second.messages)) == (3, chat("hi", "yes"))


def test_files_of_other_systems(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes("\N{BYTE ORDER MARK}".encode() + '{"prompt": "é", "answer": "\\u00fc"}\r\n\r\n'.encode())
    assert read_examples(path) == [Example(1, "é", "ü")]


GOOD = '{"prompt": "a", "answer": "b"}\n'
BROKEN = {
    "": "is empty",
    "\n  \n\n": "is empty",
    GOOD + "{": "line 2: broken JSON",
    GOOD + "\n" + '{"prompt": "a" "answer": "b"}': "line 3: broken JSON",
    GOOD + "[1, 2]": "line 2: expected a JSON object, found list",
    GOOD + '"text"': "line 2: expected a JSON object, found str",
    '{"prompt": "a"}': r'line 1: expected the keys "prompt" and "answer", or "messages"; found \[\'prompt\'\]',
    '{"prompt": "a", "answer": ""}': "line 1: the answer is empty",
    '{"prompt": "a", "answer": " \\n"}': "line 1: the answer is empty",
    '{"prompt": "a", "answer": 3}': "line 1: prompt and answer must be strings",
    '{"prompt": null, "answer": "b"}': "line 1: prompt and answer must be strings",
    '{"messages": "hi"}': 'line 1: "messages" must be a list',
    '{"messages": [{"role": "user"}]}': 'line 1: "messages" must be a list',
    '{"messages": []}': "line 1: no message of the assistant",
    '{"messages": [{"role": "user", "content": "hi"}]}': "line 1: no message of the assistant",
    '{"messages": [{"role": "assistant", "content": " "}]}': "line 1: an answer of the assistant is empty",
    '{"messages": [{"role": "assistant", "content": null}]}': "line 1: an answer of the assistant is empty or not a string",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_files_are_refused_by_line(text, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=BROKEN[text]) as error:
        read_examples(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt": "\xff", "answer": "b"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_jsonl(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is not a file"):
        read_jsonl(tmp_path)


def test_prompt_and_answer(tmp_path):
    words = tokenizer()
    for row, item in zip(
        encode(read_examples(write_jsonl(tmp_path / "d", sums(5))), words, 64).rows, sums(5), strict=True
    ):
        assert words.decode(row["input_ids"]) == item["prompt"] + item["answer"] + EOS
        assert labelled(row, words) == [item["answer"] + EOS]


def test_the_prompt_is_tokenised_as_for_generation_and_evaluation():
    words = tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A {EOS}", special_tokens=[(EOS, words.eos_token_id)]
    )
    assert words("ab").input_ids[-1] == words.eos_token_id, "this tokenizer ends every text"
    (row,) = encode([Example(1, "ab", "c")], words, None).rows
    assert prompt_ids(words, "ab") == [words.eos_token_id, *words("ab", add_special_tokens=False).input_ids]
    assert words.decode(row["input_ids"]) == f"{EOS}abc{EOS}"
    assert labelled(row, words) == [f"c{EOS}"]


def test_an_empty_prompt_starts_from_the_end_token():
    """So that the answer's first token is predicted from something, and learned."""
    words = tokenizer()
    (row,) = encode([Example(1, "", "hi")], words, None).rows
    assert words.decode(row["input_ids"]) == f"{EOS}hi{EOS}"
    assert labelled(row, words) == [f"hi{EOS}"]


def test_chats_have_labels_on_every_answer():
    words = tokenizer(chat=True)
    messages = [turn("system", "be brief"), *chat("1+1?", "2", "and 2+2?", "4")]
    (row,) = encode([Example(1, messages=tuple(messages))], words, None).rows
    assert words.decode(row["input_ids"]) == (
        f"<system>be brief<user>1+1?<assistant>2{EOS}<user>and 2+2?<assistant>4{EOS}"
    )
    assert labelled(row, words) == [f"2{EOS}", f"4{EOS}"]


def test_chat_puts_a_plain_prompt_into_the_template():
    words = tokenizer(chat=True)
    (plain,) = encode([Example(1, "1+1?", "2")], words, None, chat=True).rows
    (messages,) = encode([Example(1, messages=tuple(chat("1+1?", "2")))], words, None).rows
    assert plain == messages
    assert plain["input_ids"][: plain["labels"].index(plain["input_ids"][-2])] == prompt_ids(words, "1+1?", chat=True)


TEMPLATES = {
    None: "line 7|no chat template",
    # Strips what was thought from all answers but the last, as some models' templates do.
    "{% for m in messages %}{{ m.role[0] }}{{ m.content if loop.last else '' }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}": "line 7: the chat template rewrites earlier turns",
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}": "line 7: the chat template drops",
    "{{ raise_exception('roles must alternate') }}": "line 7: the chat template refuses these messages: roles must alternate",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_do_not_fit(template):
    words = tokenizer()
    words.chat_template = template
    with pytest.raises(ValueError, match=TEMPLATES[template]):
        encode([Example(7, messages=tuple(chat("1?", "2", "3?", "4")))], words, None)


def test_a_tokenizer_without_an_end_token():
    words = tokenizer()
    words.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        encode([Example(1, "a", "b")], words, None)


def test_examples_too_long_are_left_out_whole_and_counted():
    examples = [Example(line, "x" * length, "y") for line, length in enumerate((3, 4, 5, 6, 7, 8, 9, 10, 3), start=1)]
    encoded = encode(examples, tokenizer(), 6)  # the answer and the end take 2
    assert [len(row["input_ids"]) for row in encoded.rows] == [5, 6, 5]
    assert encoded.too_long == [3, 4, 5, 6, 7, 8]
    assert encoded.report() == "6 of 9 examples are longer than 6 tokens and were left out (lines 3, 4, 5, 6, 7, ...)"
    assert encode(examples, tokenizer(), None).report() == ""
    with pytest.raises(ValueError, match="no example is left to use: 9 of 9 examples are longer than 2 tokens"):
        encode(examples, tokenizer(), 2)
