"""docs/planted.md says what the runs in docs/planted.jsonl measured."""

import dataclasses

import pytest

from benchmarks import planted


@pytest.fixture(scope="module")
def rows():
    return planted.read(planted.RESULTS)


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
