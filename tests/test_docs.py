"""What is shown has been run: the code blocks of the README and the docs, and the claims of the model card."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.models import REFERENCE_FOLDER

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d\.\d{3}")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    # the whole recipe takes a minute and is run by the tests of the command line; here, its first steps
    few_steps = functools.partial(bc.SparsifyConfig, max_steps=3)
    monkeypatch.setattr(bc, "SparsifyConfig", few_steps, raising=False)
    namespace: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)
    if page.name == "README.md":
        assert "Verdict" in capsys.readouterr().out
        assert namespace["logits"].shape[-1] == 1024


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_ones_the_parser_knows(page):
    commands = re.findall(r"^bigram-circuits ([^#\n]*)", "\n".join(blocks(page, "sh")), re.MULTILINE)
    for command in commands:
        cli._parser().parse_args(command.split())
    if page.name == "README.md":
        assert len(commands) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link.split("#")[0]).exists(), link


def test_the_model_card_states_what_is_measured(tmp_path):
    card = (REFERENCE_FOLDER / "README.md").read_text()
    for file in REFERENCE_FOLDER.iterdir():
        if file.name != "README.md":
            (tmp_path / file.name).symlink_to(file)
    command = [sys.executable, "-m", "bigram_circuits.reference.train", "--measure", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    again = (tmp_path / "README.md").read_text()
    numbers, measured = (
        [float(number) for row in re.findall(r"^\|.*positions.*", text, re.MULTILINE) for number in NUMBER.findall(row)]
        for text in (card, again)
    )
    if sys.version_info[:2] == (3, 11):  # the version whose documentation the card measured
        assert measured == pytest.approx(numbers, abs=0.02)
    seen, bigram, everywhere, mixed = measured
    assert seen < bigram - 0.5
    assert everywhere < mixed - 0.5
