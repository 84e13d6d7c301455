"""The inspect page: what its HTML holds, and (marker `browser`) what it does in a headless Chromium."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from byte_models import adapted, save_adapted
from families import BLOCKS
from rich.console import Console

from adafuse.inspection import inspect_text
from adafuse.page import expert_colour, run_inspection, write_page

HOSTILE = '</script><b title="x">&amp;\'</b>\r\n\tt\n\n<!-- é🙂 ]]>{{ 7 }}'


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.tokens, self.words, self.data = [], [], [], ""
        self._inside = None
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "span" and attributes.get("class") == "t":
            self.tokens.append(SimpleNamespace(text="", **{k.replace("-", "_"): v for k, v in attributes.items()}))
            self._inside = "token"
        elif attributes.get("id") == "data":
            self._inside = "data"
        elif tag in ("style", "script"):
            self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "token":
            self.tokens[-1].text += data
        elif self._inside == "data":
            self.data += data
        elif self._inside is None:
            self.words += data.split()

    @property
    def shown(self):
        """The words a reader sees, outside the text itself."""
        return " ".join(self.words)


def page_of(folder, text="to be or not to be", **changes):
    """(Report of the text under a tiny model, its Page)."""
    report = inspect_text(*adapted(**changes), text)
    return report, Page(write_page(report, folder / "page.html"))


@pytest.mark.parametrize("text", [HOSTILE, " \n a", "{% raw %}", "\u202eabc\u2028\u0085", "a\rb"])
def test_the_page_holds_the_text_exactly(tmp_path, text):
    report, page = page_of(tmp_path, text)
    assert "".join(token.text for token in page.tokens) == text
    assert [token.text for token in page.tokens] == list(report.pieces)
    assert [int(token.data_e) for token in page.tokens] == report.experts[:, 0, 0].tolist()


def test_a_null_character_is_shown_by_its_symbol(tmp_path):
    assert "".join(token.text for token in page_of(tmp_path, "a\0b")[1].tokens) == "a␀b"


def test_text_does_not_become_markup(tmp_path):
    tags = [tag for tag, _ in page_of(tmp_path, HOSTILE)[1].tags]
    assert tags == [tag for tag, _ in page_of(tmp_path, "x" * len(HOSTILE.encode()))[1].tags]


@pytest.mark.parametrize("routing", ["model", "layer"])
def test_the_page_needs_nothing_from_outside(tmp_path, routing):
    _, page = page_of(tmp_path, routing=routing)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "a"} & {tag for tag, _ in page.tags}
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction"}
    assert not [attributes for _, attributes in page.tags if loading & set(attributes)]
    assert not re.search(r"url\(|@import|https?:|//\w|fetch\(|XMLHttp|import\(", page.source)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("routing", ["model", "layer"])
def test_the_data_of_the_page_are_those_of_the_report(tmp_path, routing):
    report, page = page_of(tmp_path, routing=routing)
    data = json.loads(page.data)
    assert data["experts"] == report.experts.movedim(1, 0).tolist()
    assert data["load"] == [pytest.approx(row, abs=1e-5) for row in report.statistics["load"].tolist()]
    for per_token, wanted in zip(data["weights"], report.weights.movedim(1, 0).tolist(), strict=True):
        assert [[w / 1000 for w in token] for token in per_token] == [pytest.approx(w, abs=6e-4) for w in wanted]


def test_the_numbers_a_reader_sees(tmp_path):
    report, page = page_of(tmp_path, routing="layer")
    stats = report.statistics
    rows = [f"{bits:.2f}" for bits in stats["load_entropy"].tolist()]
    assert f"{stats['load_entropy'].mean():.2f} bits" in page.shown
    assert f"{100 * stats['same_set'].mean():.1f} %" in page.shown
    assert f"{100 * stats['overlap_chance'].mean():.1f} %" in page.shown
    for block in range(BLOCKS):
        assert f"block {block} {rows[block]}" in page.shown
    assert f"a decision for each of {BLOCKS} blocks" in page.shown


def test_a_page_of_one_decision_has_no_blocks_to_choose(tmp_path):
    _, page = page_of(tmp_path, routing="model")
    assert "one decision for all blocks" in page.shown
    assert "block" not in [attributes.get("id") for _, attributes in page.tags]


def test_one_expert_a_token_shows_its_probability(tmp_path):
    report, page = page_of(tmp_path, top_k=1)
    assert f"Weight of the chosen expert {report.statistics['weights'].mean():.3f}" in page.shown
    assert "Entropy of a token's weights" not in page.shown


def test_collapsed_experts_are_counted(tmp_path):
    """One byte over and over: its two experts take all, the other two nothing."""
    report, page = page_of(tmp_path, "a" * 20)
    assert len(report.statistics["collapsed"]) == 2
    assert "Collapsed experts 2 of 4, under a tenth of an even load" in page.shown


def test_a_short_text_cannot_tell_which_experts_collapsed(tmp_path):
    """19 tokens of 2 choices are fewer than 10 for each of 4 experts."""
    assert "the text is too short to tell" in page_of(tmp_path, "a" * 19)[1].shown


def test_a_text_of_one_token_has_no_neighbours(tmp_path):
    assert "Neighbours with the same experts – in random order: –" in page_of(tmp_path, "a")[1].shown


def test_experts_have_colours_of_their_own():
    colours = [expert_colour(e) for e in range(64)]
    assert len(set(colours)) == 64
    assert all(0 <= hue < 360 and 0 <= level <= 1 for hue, level in colours)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_one_line(tmp_path, capsys):
    base, adapter = save_adapted(tmp_path)
    text, out = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_bytes("\ufeffone\r\ntwo".encode())
    report = run_inspection(adapter, text, out, console=Console(width=200))
    assert report.text == "one\r\ntwo"
    assert "".join(token.text for token in Page(out).tokens) == "one\r\ntwo"
    assert capsys.readouterr().out.startswith("8 tokens, entropy of the load ")
    assert base.name in Page(out).shown
    assert str(tmp_path) not in Page(out).source


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a file"), (b"", "is empty"), (b"\xef\xbb\xbf", "is empty"), (b"caf\xe9", "is not UTF-8 text")],
)
def test_unreadable_texts_are_refused_before_the_model_is_loaded(tmp_path, content, message):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run_inspection(tmp_path / "no-adapter", text, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("out", "message"), [("missing/page.html", "folder does not exist"), (".", "is a folder")])
def test_places_that_cannot_be_written_are_refused_before_the_model_is_loaded(tmp_path, out, message):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        run_inspection(tmp_path / "no-adapter", tmp_path / "text.txt", tmp_path / out)


# --- in a browser --------------------------------------------------------------------------------------------------

# Goes into the head: notes what goes wrong. The other goes behind the page's script: uses the page and writes down what it sees.
WATCH = """<script>
const wrong = [];
addEventListener("error", (event) => wrong.push(String(event.message)));
document.addEventListener("securitypolicyviolation", (event) => wrong.push(event.violatedDirective));
</script>"""
PROBE = """<script>
const all = (selector) => [...document.querySelectorAll(selector)];
const look = () => ({
  colours: tokens.map((token) => Number(token.dataset.e)),
  shown: all(".shown").map((element) => element.textContent),
  rows: all("[data-block].on").map((row) => Number(row.dataset.block)),
  slider: block ? block.valueAsNumber : null,
  loads: bars.map((bar) => parseFloat(bar.lastElementChild.textContent)),
});
const seen = { start: look() };
const rows = all("[data-block] button");
if (rows.length) {
  rows[0].click(), (seen.row = look());
  block.value = 1, block.dispatchEvent(new Event("input")), (seen.slider = look());
}
bars[2].click();
seen.hits = tokens.map((token) => token.classList.contains("hit"));
bars[2].click();
seen.unpressed = !text.classList.contains("only");
tokens[1].click();
seen.detail = [...detail.children].map((element) => element.textContent);
seen.text = text.textContent;
const background = getComputedStyle(tokens[0]).backgroundColor;
seen.painted = background !== "rgba(0, 0, 0, 0)";
const finish = () => {
  const report = document.createElement("pre");
  report.id = "seen";
  report.textContent = encodeURIComponent(JSON.stringify({ ...seen, wrong }));
  document.body.append(report);
};
addEventListener("hashchange", () => ((seen.hash = look()), finish()));
location.hash = location.hash === "#block=0" ? "#block=1" : "#block=0";
</script>"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """browse(address) -> the document after its scripts ran. Skips where there is no Chromium, or none that starts."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no Chromium is installed (looked for {', '.join(BROWSERS)})")
    profile = tmp_path_factory.mktemp("profile")

    def run(address):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [browser, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", address]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60).stdout

    try:
        starts = "started" in run("data:text/html,<script>document.write('star'+'ted')</script>")
    except (OSError, subprocess.TimeoutExpired):
        starts = False
    if not starts:
        pytest.skip(f"{browser} is installed, but does not start headless here")
    return run


def use(browse, path, hash_=""):
    """Open the page with the probe in it; what the probe saw."""
    from urllib.parse import unquote

    source = path.read_text(encoding="utf-8")
    probed = path.with_name("probed.html")
    probed.write_text(source.replace("<title>", WATCH + "<title>").replace("</body>", PROBE + "</body>"), "utf-8")
    document = browse(probed.as_uri() + hash_)
    found = re.search(r'<pre id="seen">([^<]*)</pre>', document)
    assert found, f"the page's script did not run to its end: {document[-500:]}"
    return json.loads(unquote(found[1]))


def view(report, decision):
    """What the page must look like with a block chosen."""
    loads = report.statistics["load"][decision].tolist()
    return report.experts[:, decision, 0].tolist(), [pytest.approx(100 * load, abs=0.051) for load in loads]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("hash_", "first"), [("", 0), ("#block=1", 1), ("#block=0", 0), ("#block=99", 1), ("#block=x", 0)]
)
def test_choosing_a_block(tmp_path, browse, hash_, first):
    report = inspect_text(*adapted(routing="layer"), HOSTILE)
    seen = use(browse, write_page(report, tmp_path / "page.html"), hash_)
    assert seen["wrong"] == []
    ways = {"start": first, "row": 0, "slider": 1, "hash": 1 if hash_ == "#block=0" else 0}
    for way, decision in ways.items():
        colours, loads = view(report, decision)
        assert seen[way]["colours"] == colours, way
        assert seen[way]["loads"] == loads, way
        assert set(seen[way]["shown"]) == {str(decision)}, way
        assert set(seen[way]["rows"]) == {decision}, way
        assert seen[way]["slider"] == decision, way


@pytest.mark.browser
def test_choosing_a_fraction_of_a_block_does_no_harm(tmp_path, browse):
    report = inspect_text(*adapted(routing="layer"), "text")
    seen = use(browse, write_page(report, tmp_path / "page.html"), "#block=0.5")
    assert seen["wrong"] == []
    assert seen["start"]["slider"] == 0


@pytest.mark.browser
@pytest.mark.parametrize("routing", ["model", "layer"])
def test_pointing_at_tokens_and_experts(tmp_path, browse, routing):
    report = inspect_text(*adapted(routing=routing, num_experts=6), HOSTILE)
    seen = use(browse, write_page(report, tmp_path / "page.html"))
    decision = 1 if routing == "layer" else 0  # the probe moved the slider there
    assert seen["wrong"] == []
    assert seen["text"] == HOSTILE
    assert seen["painted"]
    assert seen["hits"] == [2 in chosen for chosen in report.experts[:, decision].tolist()]
    assert seen["unpressed"]
    choices = zip(report.experts[1, decision].tolist(), report.weights[1, decision].tolist(), strict=True)
    assert seen["detail"] == ["token 1", '"/"', *(f"expert {e} · {w:.3f}" for e, w in choices)]
