"""The documents: the example runs, every command parses, figures come from the commands beside
them, links lead somewhere."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path for folder in (".", "docs", "weights", "results") for path in (ROOT / folder).glob("*.md")
)
TEXT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS}
HISTORY = "CHANGELOG.md"  # names commands that are gone


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def calls(line: str) -> list[list[str]]:
    """The calls of Python in a line, as module and arguments: `python train.py`, `python -m
    acla.restore`, `torchrun … train.py`."""
    found = []
    for call in line.split("&&"):
        words = shlex.split(call, comments=True)
        if words[:1] == ["torchrun"]:
            words = ["python", *words[3:]]
        if words[:2] == ["python", "-m"]:
            found.append(words[2:])
        elif words[:1] == ["python"]:
            found.append([words[1].removesuffix(".py").replace("/", "."), *words[2:]])
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(document, call) of every command in a shell block, and of every complete one in a line of
    text."""
    found = []
    for name, text in TEXT.items():
        lines = [line for block in blocks("sh", text) for line in block.splitlines()]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        lines += [
            span
            for span in re.findall(r"`(python [^`\n]+)`", prose)
            if " --" in span or ".png" in span
        ]
        found += [(name, call) for line in lines for call in calls(line)]
    return [(name, call) for name, call in found if name != HISTORY]


def named_modules() -> set[str]:
    """Modules that a document names with `python -m`."""
    return {
        module
        for name, text in TEXT.items()
        for module in re.findall(r"python -m ([\w.]+\w)", text)
        if name != HISTORY
    } - {"venv"}


def command(name: str):
    """The module behind a command; of a package its `__main__`."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def test_the_example_runs():
    (example,) = blocks("python", TEXT["README.md"])
    names: dict = {}
    exec(example, names)
    assert names["attended"].aggregate.shape == (1, 48, 48, 2, 64)
    assert names["restored"].shape == (1, 1, 48, 48)


@pytest.mark.parametrize(("document", "call"), commands(), ids=lambda value: str(value)[:80])
def test_every_command_parses(document, call):
    command(call[0]).parse(call[1:])


@pytest.mark.parametrize("module", sorted(named_modules()))
def test_every_named_module_is_a_command(module):
    assert callable(command(module).parse)


def test_the_two_commands_are_there():
    first, second = (
        line for line in TEXT["README.md"].splitlines() if line.startswith("python3 -m venv")
    )
    assert "search.py --task car --q 10" in first
    assert second.endswith("pip install -e '.[test]' && pytest")


@pytest.mark.parametrize(
    ("document", "call"),
    [
        (document, call)
        for document, call in commands()
        if call[0] in ("acla.analysis.results", "acla.analysis.trial")
        and (files := [word for word in call if word.endswith((".json", ".jsonl"))])
        and all(file.startswith("results/") for file in files)
    ],
    ids=lambda value: str(value)[:80],
)
def test_tables_of_results_are_those_of_the_commands(document, call, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command(call[0]).main(call[1:])
    printed = capsys.readouterr().out
    if document == "README.md":  # its table alone
        printed = printed[: printed.index("\n\n")]
    assert printed in TEXT[document]


def test_every_trial_has_its_table():
    shown = {file for _, call in commands() for file in call if file.startswith("results/trial-")}
    assert shown == {f"results/{path.name}" for path in (ROOT / "results").glob("trial-*.json*")}


def test_sizes_are_those_of_the_commands(capsys):
    described = [call for name, call in commands() if "--describe" in call and "results" in name]
    rows = [row for row in TEXT["docs/results.md"].splitlines() if row.startswith("| EDSR")]
    rows += [row for row in TEXT["docs/results.md"].splitlines() if row.startswith("| RCAN")]
    assert len(described) == len(rows) == 3
    for call, row in zip(described, rows, strict=True):
        train.main(call[1:])
        size = json.loads(capsys.readouterr().out)
        assert f"| {size['params']:,} |" in row
        assert f"| {size['macs_48x48'] / 1e9:.2f} G |" in row


def benchmark_rows(file: str, size: str, which: str, dtype: str) -> dict[str, dict]:
    """Rows by backend, half of the keys kept, of one size and pass as documents name them."""
    lines = (ROOT / "results" / file).read_text(encoding="utf-8").splitlines()
    wanted = [*map(int, size.split("×")), "forward" if which == " forward " else "both", dtype]
    names = ("B", "H", "W", "C", "pass", "dtype")
    rows = [row for row in map(json.loads, lines) if [row[name] for name in names] == wanted]
    return {row["backend"]: row for row in reversed(rows) if 0.49 < row["keep"] < 0.51}


def operator_table(columns: int) -> list[list[str]]:
    """The rows of docs/kernels.md that begin with a size and have so many columns."""
    rows = re.findall(r"^\|( \d+×\d+×\d+×\d+ \|.*)\|$", TEXT["docs/kernels.md"], re.MULTILINE)
    return [cells for row in rows if len(cells := row.split("|")) == columns]


def test_times_of_the_operator_are_those_of_the_benchmark():
    table = operator_table(7)
    assert len(table) == 8
    for size, which, *cells in table:
        rows = benchmark_rows("bench-cpu.jsonl", size, which, "float32")
        ms = {backend: row["ms_p50"] for backend, row in rows.items()}
        grid = min(ms["grid_sample per layer"], ms["grid_sample per key"])
        expected = [ms["cpp"], ms["torch"], grid, ms["conv3x3"], grid / ms["cpp"]]
        shown = [float(cell.strip(" ×")) for cell in cells]
        assert shown == pytest.approx(expected, rel=0.006)


def test_times_on_a_gpu_are_those_of_the_benchmark():
    table = operator_table(10)
    assert len(table) == 8
    for size, which, *cells in table:
        rows = [benchmark_rows("bench-h200.jsonl", size, which, d) for d in ("float32", "bfloat16")]
        ours = [row["triton"] for row in rows]
        full = {backend: row["ms_p50"] for backend, row in rows[0].items()}
        times = [row["ms_p50"] for row in ours]
        best = [min(r[f"grid_sample per {k}"]["ms_p50"] for k in ("layer", "key")) for r in rows]
        ratios = [grid / time for grid, time in zip(best, times, strict=True)]
        shares = [row["floor_share"] for row in ours]
        expected = [*times, best[0], full["deform_conv2d"], *ratios, *shares]
        shown = [float(cell.strip(" ×")) for cell in cells]
        assert shown == pytest.approx(expected, rel=0.006, abs=0.006)


def test_the_targets_stand_beside_the_benchmarks_figures():
    table = TEXT["docs/kernels.md"].partition("\n## Targets")[2]
    rows = re.findall(r"^\| (.*) \| .* \| (.*) \| (.*) \|$", table, re.MULTILINE)
    shown = {label: [re.findall(r"\d+\.\d+", cell) for cell in cells] for label, *cells in rows}
    wide, narrow = ("1×48×48×256", "1×96×96×128"), ("16×48×48×64", "1×256×256×64")

    def span(file: str, sizes: tuple[str, ...], which: str, ours: str, other: str) -> list[float]:
        ratios = []
        for size in sizes:
            found = benchmark_rows(file, size, which, "float32")
            beside = [row["ms_p50"] for name, row in found.items() if name.startswith(other)]
            ratios.append(min(beside) / found[ours]["ms_p50"])
        return pytest.approx([min(ratios), max(ratios)], abs=0.051)

    for column, file, ours in ((0, "bench-cpu.jsonl", "cpp"), (1, "bench-h200.jsonl", "triton")):
        for label, sizes, which, name, other in (
            ("forward, C ≥ 128", wide, " forward ", ours, "grid_sample"),
            ("forward, C 64", narrow, " forward ", ours, "grid_sample"),
            ("forward, backward", wide + narrow, "both", ours, "grid_sample"),
            ("`torch`, forward", wide + narrow, " forward ", "torch", "grid_sample"),
            ("`torch`, forward, backward", wide + narrow, "both", "torch", "grid_sample"),
            ("forward against `deform_conv2d`", wide + narrow, " forward ", ours, "deform"),
        ):
            if figures := shown[label][column]:
                assert [*map(float, figures)] == span(file, sizes, which, name, other), label


def anchors(text: str) -> set[str]:
    """What links to the headings of a document end in."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", TEXT)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[document]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("document", [name for name in TEXT if name != HISTORY])
def test_named_files_exist(document):
    files = re.findall(r"(?<![\w/.])(?:acla|kernels|tests|docs)/[\w/]+\.\w+", TEXT[document])
    assert [file for file in files if not (ROOT / file).is_file()] == []
