"""Progress: an early end is a success, only an exception is none; a text log gets a line now and then."""

import io
import sys

import pytest
import tqdm.notebook

from bigram_circuits import progress as module
from bigram_circuits.progress import note, progress, silenced, steps


class Terminal(io.StringIO):
    def isatty(self):
        return True


def closed(bars):
    """The last thing that each bar of a notebook was told, without a notebook."""
    styles = []

    class Bar(tqdm.notebook.tqdm_notebook):
        def __init__(self, *args, **options):
            tqdm.std.tqdm.__init__(self, *args, **options, file=io.StringIO(), gui=True)
            self.disp = lambda bar_style=None, close=False, **_: styles.append(bar_style or ("closed" if close else ""))
            self.displayed = True
            self.sp = None

        display = lambda self, *_, **__: None  # noqa: E731

    bars(Bar)
    return styles


def stopped_early(total=100):
    with progress(total, desc="learning", unit="step") as bar:
        for _ in range(28):
            bar.update()
            if bar.n == 28:
                break


def test_an_early_stop_is_no_failure_in_a_notebook(monkeypatch):
    def run(kind):
        monkeypatch.setattr(module, "_kind", lambda: kind)
        stopped_early()

    assert closed(run) == ["closed"]


def test_an_exception_is_one(monkeypatch):
    def run(kind):
        monkeypatch.setattr(module, "_kind", lambda: kind)
        with pytest.raises(ZeroDivisionError), progress(100, desc="learning", unit="step"):
            1 / 0  # noqa: B018

    assert closed(run) == ["danger"]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(module, "_DELAY", 0.0)
    stopped_early()
    assert "learning:" in sys.stderr.getvalue()
    assert "\r" in sys.stderr.getvalue()


@pytest.mark.parametrize("total", [400, None])
def test_a_log_gets_a_line_now_and_then(monkeypatch, total):
    clock = [0.0]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])
    with progress(total, desc="learning", unit="step") as bar:
        for _ in range(400):
            clock[0] += 0.25  # 100 seconds in all
            bar.set_postfix_str("CE 1.234", refresh=False)
            bar.update()
    text = sys.stderr.getvalue()
    lines = text.splitlines()
    assert "\r" not in text
    assert 3 <= len(lines) <= 6
    assert lines[0].startswith("learning: 8")
    assert f" of {total or '?'} steps after 00:2" in lines[0]
    assert "CE 1.234" in lines[0]


def test_short_work_leaves_no_trace_in_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    stopped_early()
    assert list(steps("abc", 3, desc="reading", unit="letter")) == ["a", "b", "c"]
    assert sys.stderr.getvalue() == ""


def test_notes_are_logged(caplog):
    note("back to step 3\x1b[2J")
    assert caplog.messages == [r"back to step 3\x1b[2J"]


def test_nothing_is_shown_while_it_is_silenced(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(module, "_DELAY", 0.0)
    with silenced():
        stopped_early()
        with progress(desc="reading", unit="file") as bar:
            bar.set_postfix_str("a")
    assert sys.stderr.getvalue() == ""
    stopped_early()
    assert "learning:" in sys.stderr.getvalue()


def test_bars_can_be_switched_off(monkeypatch, capsys):
    monkeypatch.setattr(module, "_kind", lambda: module._Lines)
    with progress(3, desc="learning", unit="step", disable=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
