"""Text from files on a terminal: read as text, whatever it looks like."""

from __future__ import annotations

import errno
import io
import shutil

import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table

from locum.cli import cli, progress
from locum.cli.results import show_bench, show_checks, show_demo, show_inspect, show_rows
from locum.cli.shown import add_row, print_table, shown
from locum.measure.rows import Row, read_rows
from locum.verification.folder import Check
from making.checkpoints import locum as command

ODD = "run[/2] [bold]x[/bold] :smile:"
RAW = "a\x1b[2Jb\x07\u202ec"


def test_what_cannot_be_printed_is_written_out():
    assert shown(RAW) == r"a\x1b[2Jb\x07\u202ec"
    assert shown("naïve café 世界 🙂\n\t", keep="\n") == "naïve café 世界 🙂\n\\t"
    assert shown("\udcff") == r"\udcff"


def test_cells_and_heads_are_text(capsys):
    table = Table(ODD, box=None)
    add_row(table, ODD)
    add_row(table, RAW)
    print_table(table, 120)
    said = capsys.readouterr().out
    assert said.count(ODD) == 2 and shown(RAW) in said and "\x1b" not in said


def row_of(name: str) -> Row:
    return Row(name, None, "loss", name, 1.0, None, None, 5, 0, 1.0, 1, {})


LAYER = {"name": ODD, "num_experts": 8, "router_kind": ODD, "renormalised": True, "hidden_size": 8, "expert_width": 8}
LAYER |= {"num_groups": 1, "shared_experts": 0, "top_k": 2, "routing": ODD, "router": ODD}
INSPECTED = {"expert_parameters": 1, "parameters": 2, "model_type": ODD, "compressed": False, "bytes": 5}
INSPECTED |= {
    "active_parameters": 1,
    "active_bytes": 1,
    "experts_per_token": [2.0, 1.5],
    "layers": [LAYER],
    "notes": [RAW],
    "would_save": None,
    "next": "x",
}
SPEED = {"rows": [], "models": {}, "not_run": [{"model": RAW, "implementation": ODD, "batch": 1, "why": RAW}]}
COMPARED = {"models": [{"model": ODD, "bits_per_byte": {ODD: 1.0}, "seconds": 1.0, "bytes": 5}], "report": RAW}


@pytest.mark.parametrize(
    ("show", "result"),
    [
        (show_rows, [row_of(ODD), row_of(RAW)]),
        (show_checks, [Check(ODD, ODD, "ok", RAW)]),
        (show_inspect, INSPECTED),
        (show_bench, SPEED),
        (show_demo, COMPARED),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_result_shows_names_as_they_are(show, result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    show(result, False)
    said = capsys.readouterr().out
    assert ODD in said and shown(RAW) in said and "\x1b[2J" not in said


def test_a_name_with_brackets_does_not_end_an_evaluation(checkpoint, words, tmp_path, monkeypatch):
    model = shutil.copytree(checkpoint, tmp_path / "m[/x]")
    options = ("--tokens", 128, "--length", 64, "--split", "all", "--resamples", 5, "--name", "run[/2]")
    result = command("eval", model, "--data", f"d[b]={words}", *options)
    assert result.exit_code == 0 and "run[/2]" in result.stdout and "d[b]" in result.stdout


def test_results_that_cannot_be_written_are_printed(checkpoint, words, tmp_path, monkeypatch):
    def refuse(path, text):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("locum.measure.rows.write_text", refuse)
    options = ("--tokens", 128, "--length", 64, "--split", "all", "--resamples", 5)
    result = command("eval", checkpoint, "--data", words, *options, "--out", tmp_path / "rows", "--json")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"{tmp_path}/rows: Input/output error; what was measured is printed instead" in result.stderr
    (tmp_path / "printed").write_text(result.stdout)
    assert {row.metric for row in read_rows(tmp_path / "printed")} >= {"loss", "bits_per_byte"}


def test_progress_has_names_of_any_kind(monkeypatch):
    console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    monkeypatch.setattr(progress, "console", console)
    with progress.progress_lines() as report:
        report(f"eval {ODD}: {RAW}", 1, 2)
    assert "run[/2] [bold]x[/bold]" in console.export_text()


def test_errors_show_what_they_quote_as_text(tmp_path):
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path / RAW)], prog_name="locum")
    assert result.exit_code == 2 and r"\x1b[2J" in result.stderr and "\x1b" not in result.stderr


def test_paragraphs_are_wrapped_anew_and_lists_are_not(monkeypatch):
    """A docstring's lines are longer than the terminal; formulas and items of lists keep theirs."""
    monkeypatch.setenv("COLUMNS", "80")
    said = command("show", "prune").output.split("\n\n")[1].splitlines()
    assert all(len(line) > 60 for line in said[:-1]) and len(said) > 3
    text = command("show", "leave-one-out").output
    assert "\n  2. With `curve`" in text and "\n  Both are the search" in text
