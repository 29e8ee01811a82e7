"""docs/planted.md says what the runs in docs/planted*.jsonl measured, and these are complete."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest

from benchmarks import planted

sys.path.append(str(Path(planted.__file__).parent))  # benchmarks import each other
from benchmarks import planted_attention


@pytest.fixture(scope="module")
def rows():
    return planted.read(planted.RESULTS)


def test_every_cell_has_all_seeds_with_the_present_settings(rows):
    groups = planted.by_cell(rows)
    assert set(groups) == set(planted.cells(planted.ARCHITECTURES, planted.LAYERS, planted.DISTRACTORS))
    for cell, group in groups.items():
        assert sorted(row.seed for row in group) == sorted(planted.SEEDS), cell
    assert len(rows) == len(planted.RESULTS.read_text().splitlines())  # none is of other settings
    assert len({row.key for row in rows}) == len(rows)


def test_the_page_is_what_the_benchmark_writes_of_them(rows):
    page = (planted.PAGES / "planted.md").read_text()
    assert planted.page_with(page, rows) == page


def test_the_table_says_means_and_least_values(rows):
    first = rows[0]
    group = [
        dataclasses.replace(first, seed=seed, precision=0.9 + seed / 1000, polished_kept=kept, polished_kl=0.25)
        for seed, kept in ((10, 70), (12, 80))
    ]
    line = planted.table(group)[-1].split(" | ")
    assert line[5:7] == ["2", "0.911 (0.910)"]
    assert line[-2:] == [f"75 of {first.planted}", "0.2500 |"]


def test_what_each_row_says_can_be(rows):
    for row in rows:
        for found, precision, recall in (
            (row.kept, row.precision, row.recall),
            (row.polished_kept, row.polished_precision, row.polished_recall),
        ):
            assert found * precision == pytest.approx(row.planted * recall, abs=0.5)
        if row.size == "target fraction":
            assert row.kept == row.polished_kept == row.planted


def test_rows_of_other_settings_are_left_out_and_those_that_are_there_are_not_measured_again(rows, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    records = [dataclasses.asdict(row) for row in rows if planted.cell_of(row)[:3] == ("gpt2", 1, 0.1)]
    other = [record | {"settings": "other"} for record in records if record["method"] != "magnitude"]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, *other]))
    before = path.read_text()
    planted.main(
        ["--results", str(path), "--architectures", "gpt2", "--layers", "1", "--distractors", "0.1"]
    )  # measures nothing
    assert path.read_text() == before
    assert "| gpt2 | 1 | 0.1 | continuous sparsification | target fraction | 5 |" in capsys.readouterr().out


def test_nodes_and_edges_are_found_on_every_attention_circuit_with_every_seed():
    rows = planted_attention.read(planted_attention.RESULTS)
    groups = planted_attention.by_cell(rows)
    assert set(groups) == set(itertools.product(planted_attention.KINDS, planted_attention.UNITS))
    for group in groups.values():
        assert sorted(row.seed for row in group) == sorted(planted.SEEDS)
        for row in group:
            assert min(row.precision, row.recall) >= planted.WANTED
    assert len(rows) == len(planted_attention.RESULTS.read_text().splitlines())  # none is of another recipe
    page = (planted.PAGES / "planted.md").read_text()
    assert planted_attention.page_with(page, rows) == page
