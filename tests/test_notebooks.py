"""The notebooks run, their stored outputs are fresh, and they can be read where no code runs and no network is."""

import functools
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

import bigram_circuits as bc

FOLDER = Path(__file__).parents[1] / "notebooks"
spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

SOURCES = build.sources()
PLOTLY = build.PLOTLY
RUN_TWICE = ("05-your-own", "06-published-masks")  # they write files, which must not stand in the way of a second run
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def stored(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_every_notebook_has_a_source_and_the_other_way_round():
    assert len(SOURCES) == 10
    assert sorted(FOLDER.glob("*.ipynb")) == [source.with_suffix(".ipynb") for source in SOURCES]


@pytest.fixture(scope="module")
def little(reference_model):
    """A few short sequences of the reference text."""
    text = bc.load_corpus("reference", tokenizer=reference_model.tokenizer, max_tokens=50_000, context_length=48)
    return replace(text, held_out=text.held_out[:16], train=text.train[:48])


@pytest.fixture
def made_quick(monkeypatch, reference_model, little, no_forecast):
    """Few steps and little text; the reference model and its text are read once for all notebooks."""
    load_model, load_corpus = bc.load_model, bc.load_corpus
    replacements = {
        "SparsifyConfig": functools.partial(bc.SparsifyConfig, max_steps=3),
        "load_model": lambda name, **rest: reference_model if name == "reference" else load_model(name, **rest),
        "load_corpus": lambda name, **rest: little if name == "reference" else load_corpus(name, **rest),
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(bc, name, replacement, raising=False)


@each_notebook
def test_its_code_runs(source, made_quick, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cells = [cell.source for cell in build.notebook(source).cells if cell.cell_type == "code"]
    for _ in range(2 if source.stem in RUN_TWICE else 1):
        namespace = {"__name__": source.stem}
        for code in cells:
            exec(compile(few(code), str(source), "exec"), namespace)


def few(code):
    """The code of a cell with a small number where it says how much is to be done."""
    for pattern, less in (
        (r"range\(300\)", "range(3)"),
        (r'max_steps": \d+', 'max_steps": 3'),
        ("prompts=16", "prompts=2"),
        ("prompts=40, period=16", "prompts=6, period=8"),
        (r"max_steps=\d+", "max_steps=3"),
        (r"sizes=\(0\.05, [\d., ]+\)", "sizes=(0.1, 0.3)"),
        (r"\[::14\]", "[::50]"),
        (r"budgets=\([\d, ]+\)", "budgets=(0, 1)"),
        ("seeds=3, random_seeds", "seeds=2, random_seeds"),
        ("seeds=[23], steps=5", "seeds=1, steps=1"),
        (r"tokens=(24|32|60)\b", "tokens=2"),
        ("neurons=100", "neurons=20"),
        ("tokens=6_?000, fit_tokens=12_?000", "tokens=500, fit_tokens=1000"),
        (r"corpus\.held_out, seeds=5", "corpus.held_out, seeds=1"),
    ):
        code = re.sub(pattern, less, code)
    return code


@each_notebook
def test_it_is_fresh(source):
    notebook, made = stored(source), build.notebook(source)
    nbformat.validate(notebook)
    again = f"{source.stem} has changed: make notebooks"
    assert [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.id, cell.cell_type, cell.source) for cell in made.cells
    ], again
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), again
    assert notebook.metadata == build.METADATA


@each_notebook
def test_its_outputs_are_small_and_say_nothing_of_where_they_were_made(source):
    notebook = stored(source)
    assert source.with_suffix(".ipynb").stat().st_size < 2_000_000
    assert outputs(notebook)
    for output in outputs(notebook):
        assert output.output_type in ("stream", "display_data", "execute_result")
        assert output.get("name", "stdout") == "stdout"  # no warnings, no bars
        words = json.dumps({key: value for key, value in output.get("data", {}).items() if key != "image/svg+xml"})
        words += output.get("text", "")
        assert not re.search(r"(?<![\w.:/<])/(tmp|home|root|usr|work|Users|var|opt|mnt)/|[A-Z]:\\\\", words)
        assert not any("widget" in kind for kind in output.get("data", ()))
    for cell in notebook.cells:
        assert not re.search(r"^[%!]", cell.source, re.MULTILINE)


@each_notebook
def test_every_picture_can_be_seen_where_no_code_runs(source):
    pictures = [output.data for output in outputs(stored(source)) if PLOTLY in output.get("data", {})]
    assert pictures or source.stem.startswith("06")
    for data in pictures:
        assert data["image/svg+xml"].startswith("<svg")
        assert "text/html" not in data  # would be shown first, and load plotly from elsewhere


@each_notebook
def test_it_ends_with_the_lines_for_other_models(source):
    last = build.notebook(source).cells[-1]
    assert last.cell_type == "markdown"
    assert "## Your model" in last.source
    for name in ("pythia", "llama"):
        assert name in last.source.lower()
    code = re.search(r"```python\n(.*?)```", last.source, re.DOTALL)
    compile(code[1], source.name, "exec")


@each_notebook
def test_its_links_lead_somewhere(source):
    text = "\n".join(cell.source for cell in build.notebook(source).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        link = "".join(link.split())
        assert link.startswith("https://") or (FOLDER / link).exists(), link


@each_notebook
def test_as_a_page_it_opens_offline(source, browser, tmp_path):
    file = tmp_path / f"{source.stem}.html"
    notebook = stored(source)
    file.write_text(build.page(notebook, source.stem), encoding="utf-8")
    context = browser.new_context(offline=True)
    requests, errors = [], []
    page = context.new_page()
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert errors == []
    sizes = page.evaluate(
        "[...document.querySelectorAll('.jp-RenderedSVG img, .jp-RenderedSVG svg')].map(x => x.clientWidth)"
    )
    pictures = [output for output in outputs(notebook) if PLOTLY in output.get("data", {})]
    assert len(sizes) == len(pictures)
    assert all(size > 300 for size in sizes)
    assert page.locator("table").count() >= 1
    context.close()
