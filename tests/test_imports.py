"""Who may import whom, read from the sources; and a fresh process without Triton."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parents[1]
# Floors of the house, the lowest first: a module imports from lower floors, and from its own
# package where that makes no circle.
FLOORS = (
    {"errors", "kernels"},
    {"config", "files", "distributed"},
    {"console"},
    {"cli", "data", "models"},
    {"restore", "training", "checkpoint"},
    {"search"},
    {"analysis"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SCRIPTS = ("train", "search", "evaluate")
PACKAGES = {"torch", "triton", "numpy", "torchvision"}  # torchvision: a baseline of the benchmark


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for folder in ("acla", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """Every module that a source names in an import, with its dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= whole & SOURCES.keys() or {node.module}
    return names


def room(module: str) -> str:
    """The package of acla, or the module on its top level, or kernels."""
    return module.removeprefix("acla.").split(".")[0]


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_go_down(module):
    ours = {name for name in imported(SOURCES[module]) if name in SOURCES}
    for other in ours:
        assert room(other) == room(module) or FLOOR[room(other)] < FLOOR[room(module)], other


def test_no_imports_go_round():
    graph = {name: imported(path) & SOURCES.keys() - {name} for name, path in SOURCES.items()}
    del graph["kernels"]  # its public names, which the kernels' benchmark uses
    for needed in graph.values():
        needed.discard("kernels")
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_never_import_each_other(script):
    tops = {name.split(".")[0] for name in imported(ROOT / f"{script}.py")}
    assert not tops & {*SCRIPTS, "kernels"}


@pytest.mark.parametrize("module", [m for m in SOURCES if room(m) == "kernels"])
def test_kernels_stand_alone(module):
    tops = {name.split(".")[0] for name in imported(SOURCES[module])} - sys.stdlib_module_names
    assert tops <= PACKAGES | {"kernels"}


def test_kernels_is_ours():
    assert Path(kernels.__file__).parent == ROOT / "kernels"


def test_everything_imports_without_triton():
    modules = [m for m in SOURCES if room(m) != "kernels"] + ["kernels", *SCRIPTS]
    program = (
        "import sys; sys.modules['triton'] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"import {', '.join(modules)}\n"
        "import torch\n"
        "rows = [torch.ones(1, 4, 4, 2)]\n"
        "print(kernels.attend(rows, torch.zeros(1, 2, 2, 1, 3, 2)).aggregate.sum().item())"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 8
