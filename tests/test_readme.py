"""The README's example runs, its commands parse, its figures come from the commands beside them."""

import json
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import search
import train
from acla import checkpoint
from acla.analysis import explain, gallery, loading, plots, results, tables
from acla.restore import __main__ as restore
from kernels import autotune, bench, compile

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": train, "search.py": search, "evaluate.py": evaluate}
PARTS = (
    autotune,
    bench,
    compile,
    explain,
    loading,
    gallery,
    plots,
    restore,
    results,
    tables,
)
MODULES = {module.__name__: module for module in PARTS} | {"acla.checkpoint": checkpoint}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[list[str]]:
    """Every call of a script in the README's shell blocks, as words."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    calls = [call for line in lines for call in line.split("&&")]
    words = [shlex.split(call, comments=True) for call in calls]
    called = [[w[0], *w[2:]] if w[1:2] == ["-m"] else w for w in words]
    called = [["python", *w[3:]] if w[:1] == ["torchrun"] else w for w in called]
    return [w for w in called if len(w) > 1 and w[0] == "python" and w[1] in SCRIPTS | MODULES]


def test_the_example_runs():
    (example,) = blocks("python")
    names: dict = {}
    exec(example, names)
    assert names["attended"].aggregate.shape == (1, 48, 48, 2, 64)
    assert names["restored"].shape == (1, 1, 48, 48)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_understood(words):
    (SCRIPTS | MODULES)[words[1]].parse(words[2:])


def test_the_two_commands_are_there():
    first, second = (line for line in TEXT.splitlines() if line.startswith("python3 -m venv"))
    assert "search.py --task car --q 10" in first
    assert second.endswith("pip install -e '.[test]' && pytest")


def test_scores_are_those_of_the_results(capsys, monkeypatch):
    (words,) = [w for w in commands() if w[1:3] == ["acla.analysis.results", "scores"]]
    monkeypatch.chdir(Path(__file__).parents[1])
    results.main(words[2:])
    assert capsys.readouterr().out in TEXT


def test_sizes_are_those_of_the_commands(capsys):
    described = [w for w in commands() if "--describe" in w]
    rows = [row for row in TEXT.splitlines() if row.startswith(("| EDSR", "| RCAN"))]
    assert len(described) == len(rows) == 3
    for words, row in zip(described, rows, strict=True):
        train.main(words[2:])
        size = json.loads(capsys.readouterr().out)
        assert f"| {size['params']:,} |" in row
        assert f"| {size['macs_48x48'] / 1e9:.2f} G |" in row
