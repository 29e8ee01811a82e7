"""What is shown has been run: the code blocks of the README and the docs, and the claims of the model card.

The documentation site is built as `make docs` does, any warning being an error, and what was built is looked at.
"""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from sphinx.search.en import SearchEnglish

import bigram_circuits as bc
from bigram_circuits import analysis, cli, workflow
from bigram_circuits.models.loading import REFERENCE_FOLDER
from bigram_circuits.recipe import EFFORTS, METHODS, SHORT_UNTIL
from scripts import train_reference
from scripts.state_numbers import NUMBERS, STATED, stated

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d\.\d{3}")
DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts]
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
PUBLIC = {*bc.__all__, *analysis.__all__}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def some_text(load_corpus, sequences, *source, **options):
    """A part of the reference text, and of its held-out part a few sequences."""
    few = min(options.get("max_tokens", 20_000), 20_000)
    corpus = load_corpus(*source, **({"context_length": 48} | options | {"max_tokens": few}))
    return replace(corpus, held_out=corpus.held_out[:sequences])


def some_held_out(load_corpus, every, *source, **options):
    """The text, with every so many sequences of its held-out part."""
    corpus = load_corpus(*source, **options)
    return replace(corpus, held_out=corpus.held_out[::every])


@pytest.fixture
def read_once(monkeypatch, reference_model):
    """The reference model is read once for all pages; they leave it as they found it."""
    load_model = bc.load_model

    def load(name, *rest, **options):
        return reference_model if (name, rest, options) == ("reference", (), {}) else load_model(name, *rest, **options)

    monkeypatch.setattr(bc, "load_model", load, raising=False)
    before = {name: tensor.clone() for name, tensor in reference_model.state_dict().items()}
    yield
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference_model.state_dict().items())


@each_page
@pytest.mark.usefixtures("no_forecast", "read_once")
def test_python_blocks_run_in_order(page, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    # the whole recipe takes a minute and is run by the tests of the command line; here, its first steps
    few_steps = functools.partial(bc.SparsifyConfig, max_steps=3, batch_size=4)
    monkeypatch.setattr(bc, "SparsifyConfig", few_steps, raising=False)
    load_corpus = bc.load_corpus
    monkeypatch.setattr(bc, "load_corpus", functools.partial(some_text, load_corpus, 6), raising=False)
    monkeypatch.setattr(workflow, "load_corpus", functools.partial(some_text, load_corpus, 12))  # fewer: it warns
    namespace: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)
    if page.name == "README.md":
        assert "Verdict" in capsys.readouterr().out
        assert namespace["logits"].shape[-1] == 1024


@each_page
def test_commands_are_ones_the_parser_knows(page):
    shown = re.findall(r"^bigram-circuits ([^#\n]*)", "\n".join(blocks(page, "sh")), re.MULTILINE)
    for command in shown:
        cli.parser().parse_args(shlex.split(command))
    if page.name == "README.md":
        assert len(shown) >= 5


def commands():
    """Parsers of the subcommands."""
    return next(action.choices for action in cli.parser()._actions if action.choices)


def anchors(page: Path) -> set[str]:
    """Of its headings, as code hosts and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder."""
    folder = tmp_path_factory.mktemp("site")
    strictly = ["--quiet", "--fail-on-warning", "--keep-going", "--nitpicky"]
    command = [sys.executable, "-m", "sphinx", *strictly, "-d", f"{folder}.doctrees", ROOT / "docs", folder]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_site_and_reached_from_the_first(site):
    tree = (site / "index.html").read_text()
    for page in DOCS:
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / name).is_file()
        assert name == "index.html" or f'href="{name}"' in tree, name


def test_every_public_name_has_an_entry_in_the_api(site):
    built = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    entries = {entry.rpartition(".")[2] for entry in re.findall(r'id="(bigram_circuits\.[\w.]+)"', built)}
    headings = {name for page in DOCS for name in re.findall(r"^### `(\w+)`$", page.read_text(), re.MULTILINE)}
    assert PUBLIC - entries == set()
    assert PUBLIC - headings == set()
    assert "Float[Tensor, 'batch pos d_vocab']" in re.sub(r"<[^>]+>", "", built).replace("&#39;", "'")


def test_every_command_is_on_its_page(site):
    built = (site / "command-line.html").read_text()
    for name, parser in commands().items():
        assert f'id="{name}"' in built
        for option in parser._option_string_actions:
            assert option in ("-h", "--help") or f">{option}" in built, option


class Requests(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "link" and set((given.get("rel") or "").split()) <= {"index", "search", "next", "prev", "canonical"}:
            return
        if tag != "a":
            self.addresses += [given[key] for key in ("src", "srcset", "href", "data", "poster") if given.get(key)]


def test_pages_fetch_nothing_from_the_network(site):
    fetched = 0
    for page in site.rglob("*.html"):
        requests = Requests()
        requests.feed(page.read_text())
        fetched += len(requests.addresses)
        for address in requests.addresses:
            assert not re.match(r"(https?:)?//", address), (page.name, address)
    assert fetched > 0
    for sheet in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import|href=[\"']http", sheet.read_text()), sheet.name


def test_formulas_are_drawn_by_the_browser(site):
    page = (site / "method.html").read_text()
    assert page.count('display="block"') == len(re.findall(r"^\$\$$", (ROOT / "docs/method.md").read_text(), re.M)) / 2
    assert "merror" not in page


@pytest.mark.parametrize("page", STATED)
def test_pages_state_the_numbers_of_one_run(page):
    """Other numbers than those in docs/numbers.json are an error; `python scripts/state_numbers.py` writes both."""
    text = (ROOT / page).read_text()
    assert stated(page, text, json.loads(NUMBERS.read_text())) == text


def test_the_method_states_the_settings_of_the_recipes():
    text = (ROOT / "docs" / "method.md").read_text()
    own, paper = bc.SparsifyConfig(), bc.SparsifyConfig.paper()
    quick, thorough = EFFORTS["quick"], EFFORTS["thorough"]
    rate, growth = METHODS[own.method].learning_rate, 100_000 ** (1 / own.max_steps)
    slower = 100_000 ** (2 / 3)
    assert own.beta_growth is None
    for words in (
        f"| learning rate, weight decay | {100 * rate:g}e-2, {own.weight_decay:g} | "
        f"{1e5 * paper.learning_rate:g}e-5, {paper.weight_decay:g} |",
        f"| AdamW's beta_2 | {own.second_moment_decay:g} | {paper.second_moment_decay:g} |",
        f"| beta per step | x 100,000 over `max_steps`: x {growth:.3f}; with short steps x {slower:,.0f}: "
        f"x {slower ** (1 / own.max_steps):.3f} | x {paper.beta_growth} |",
        f"| short steps | of n-grams, until {SHORT_UNTIL:.0%} of `max_steps` | none |",
        f"So until `short_until` ({SHORT_UNTIL}) of `max_steps`, a step sees only the first `short_length` "
        f"({own.short_length}) tokens",
        f"| `max_steps` | {own.max_steps:,} | {paper.max_steps:,} |",
        f"| sequences per step | {own.batch_size} | {paper.batch_size} |",
        f"| a jump must have come back this long before the end | {own.recovery_steps} steps | "
        f"{paper.recovery_steps} steps |",
        f"`quick` (at most {quick['max_steps']} steps, decided at about half of that, or at {SHORT_UNTIL:.0%} with "
        f"short steps), `normal` (the default, {own.max_steps}), or `thorough` ({thorough['max_steps']:,} steps, "
        f"hard from {thorough['hard_from']:.0%} on)",
    ):
        assert words in text.replace("\n", " "), words


def test_another_number_on_a_page_would_be_noticed():
    numbers = json.loads(NUMBERS.read_text())
    text = (ROOT / "README.md").read_text()
    other = text.replace(f"{numbers['rise']:.2f} nats", "9.87 nats", 1)
    assert other != text
    assert stated("README.md", other, numbers) == text
    with pytest.raises(ValueError, match="has 0 places like this one"):
        stated("README.md", text.replace("its loss rises", "its loss grows"), numbers)


@pytest.mark.parametrize(
    ("every", "tolerance"), [(8, 0.2), pytest.param(1, 0.02, marks=pytest.mark.slow)], ids=["part", "whole"]
)
def test_the_model_card_states_what_is_measured(tmp_path, monkeypatch, every, tolerance):
    """On every eighth held-out sequence, about what is stated; on all of them, that."""
    load_corpus = train_reference.load_corpus
    monkeypatch.setattr(train_reference, "load_corpus", functools.partial(some_held_out, load_corpus, every))
    card = (REFERENCE_FOLDER / "README.md").read_text()
    for file in REFERENCE_FOLDER.iterdir():
        if file.name != "README.md":
            shutil.copy(file, tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_reference.py", "--measure", str(tmp_path)])
    train_reference.main()
    again = (tmp_path / "README.md").read_text()
    numbers, measured = (
        [float(number) for row in re.findall(r"^\|.*positions.*", text, re.MULTILINE) for number in NUMBER.findall(row)]
        for text in (card, again)
    )
    if sys.version_info[:2] == (3, 11):  # the version whose documentation the card measured
        assert measured == pytest.approx(numbers, abs=tolerance)
    seen, bigram, everywhere, mixed = measured
    assert seen < bigram - 0.5
    assert everywhere < mixed - 0.5


@each_page
def test_messages_that_are_explained_are_those_of_the_code(page):
    """In a table headed `message`: each part between the dots is in a string of the code."""
    if not (table := re.search(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)):
        return
    code = "".join(file.read_text() for file in sorted((ROOT / "bigram_circuits").rglob("*.py")))
    strings = re.sub(r'"\n\s*\+?\s*f?"', "", code)  # literals over several lines
    messages = [message for row in table[1].splitlines() for message in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(messages) > 10
    for message in messages:
        for part in re.split(r"\.\.\.", message):
            assert part.strip() in strings, message


def test_every_notebook_is_a_page_with_its_pictures(site):
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        outputs = [
            output["data"]
            for cell in json.loads(notebook.read_text())["cells"]
            for output in cell.get("outputs", ())
            if "data" in output
        ]
        assert page.count("data:image/svg+xml;base64,") == sum("image/svg+xml" in data for data in outputs)
        assert page.count("<table") >= sum("".join(data.get("text/html", "")).count("<table") for data in outputs) > 0
        assert len(page) < 1_000_000


def words_of(site):
    """Of the search index: stem -> pages, in which a word of the text or of a title is."""
    index = json.loads((site / "searchindex.js").read_text().removeprefix("Search.setIndex(").removesuffix(")"))
    found = {}
    for words in (index["terms"], index["titleterms"]):
        for word, places in words.items():
            found.setdefault(word, set()).update([places] if isinstance(places, int) else places)
    return {word: {index["docnames"][place] for place in places} for word, places in found.items()}


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("slurm", "faq"), ("cite", "cite"), ("HookedTransformer", "faq"), ("offline", "faq"), ("quantised", "faq"),
        ("refuted", "glossary"), ("nnsight", None),
    ],
)  # fmt: skip
def test_search_finds_what_people_ask_for(site, word, page):
    stem = SearchEnglish({}).stem(word.lower())
    pages = words_of(site).get(stem, set())
    assert (page in pages) if page else not pages


def test_the_citation_is_that_of_the_repository():
    text, given = (ROOT / "docs/cite.md").read_text(), yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = given["references"][0]
    for value in (given["version"], given["license"], given["repository-code"], paper["title"], paper["year"]):
        assert f"{{{value}}}" in text
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in text


@pytest.mark.parametrize(
    "symbol",
    [
        "$r$", "KL", "CE", "CPR", "CMD", r"$\lambda$", r"$\beta$", "nats", "d_model", "d_vocab", "d_head", "d_mlp",
        "W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_gate",
    ],
)  # fmt: skip
def test_symbols_are_in_the_glossary(symbol):
    terms = [row.split("|")[1] for row in (ROOT / "docs/glossary.md").read_text().splitlines() if row.startswith("| ")]
    assert any(re.search(rf"(?<!\w){re.escape(symbol)}(?!\w)", term) for term in terms)
