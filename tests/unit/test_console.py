"""Tables and progress for people."""

import io
import re

import pytest

from coprs_deploy import console
from coprs_deploy.console import StepPrinter, format_bytes, format_ms, markdown_table, table


class Terminal(io.StringIO):
    """A stderr that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock; a test moves it by ``clock.now += seconds``."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr(console, "time", fake)
    return fake


def lines_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_table_aligns_the_first_column_left_and_the_others_right():
    text = table(("graph", "max abs", ""), [("image_encoder", "1.0e-06", "ok"), ("prior", "2", "")])
    assert text.split("\n") == [
        "graph          max abs",
        "image_encoder  1.0e-06  ok",
        "prior                2",
    ]


def test_table_prints_brackets_long_cells_and_indented_rows_unchanged():
    text = table(("a", "b"), [("[bold]x[/bold]", "y" * 300), ("  input (1, 3)", ":smile:")])
    lines = text.split("\n")
    assert lines[1] == "[bold]x[/bold]  " + "y" * 300
    assert lines[2] == "  input (1, 3)  " + ":smile:".rjust(300)


def test_table_without_rows_is_its_header():
    assert table(("graph", "size"), []) == "graph  size"


def test_markdown_table_escapes_bars():
    assert markdown_table(("a", "b"), [("x|y", "1")]) == [
        "| a | b |",
        "|---|---|",
        "| x\\|y | 1 |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.123 ms"),
        (12.34, "12.3 ms"),
        (234.5, "234 ms"),
        (1234, "1.23 s"),
        (5e4, "50.0 s"),
    ],
)
def test_format_ms_has_three_digits(value, text):
    assert format_ms(value) == text


def test_format_bytes_changes_the_unit_at_one_gigabyte():
    assert format_bytes(999e6) == "999 MB"
    assert format_bytes(1.25e9) == "1.25 GB"


def test_step_printer_writes_a_line_per_step_when_it_ends(capsys, clock):
    with StepPrinter() as progress:
        progress("export graphs")
        clock.now += 2.5
        assert lines_of(capsys) == []
        progress("compare with PyTorch")
        clock.now += 10
    assert lines_of(capsys) == [
        f"  {'export graphs':<36} done     2.5 s",
        f"  {'compare with PyTorch':<36} done    10.0 s",
    ]


def test_step_printer_marks_the_step_that_fails(capsys, clock):
    with pytest.raises(KeyError), StepPrinter() as progress:
        progress("export graphs")
        raise KeyError
    assert lines_of(capsys) == [f"  {'export graphs':<36} failed     0.0 s"]


def test_step_printer_without_a_step_writes_nothing(capsys):
    with StepPrinter():
        pass
    assert lines_of(capsys) == []


def test_step_printer_in_a_log_reports_a_long_step_every_30_seconds(capsys, clock):
    with StepPrinter() as progress:
        progress("build")
        for _ in range(7):
            clock.now += 10
            progress.progress(f"at {clock.now:.0f}")
    assert lines_of(capsys) == [
        "  build: at 130",
        "  build: at 160",
        f"  {'build':<36} done    70.0 s",
    ]


def test_step_printer_notes_are_written_at_once(capsys):
    progress = StepPrinter()
    progress.note("engine from the cache [sm_89]")
    assert lines_of(capsys) == ["  engine from the cache [sm_89]"]


def test_step_printer_on_a_terminal_shows_the_running_step(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with StepPrinter() as progress:
        progress("build for [sm_89]")
        progress.progress("half")
        progress.note("a note [1]")
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "build for [sm_89]" in written
    assert "build for [sm_89]: half" in written
    assert "  a note [1]" in written
    assert re.search(r"build for \[sm_89\] +done +\d+\.\d s", written)
