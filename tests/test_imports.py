"""Who may import whom, read from the sources; and a fresh process without Triton."""

import ast
import os
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
    {"restore", "training", "checkpoint", "export"},
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
    """Every module that a source names in an import, with its dots; `acla.kernels` is kernels."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= (path.parent.name == "kernels"), f"{path.name}: relative import"
            module = ".".join(["kernels"] * node.level + [node.module] * bool(node.module))
            bare = not node.level and module.split(".")[0] == "kernels"
            assert not bare, f"{path.name}: a wheel has acla.kernels alone"
            if module.startswith("acla.kernels"):
                module = module.removeprefix("acla.")
            whole = {f"{module}.{alias.name}" for alias in node.names}
            names |= whole & SOURCES.keys() or {module}
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
    order = list(TopologicalSorter(graph).static_order())  # raises an error of a circle
    assert set(order) >= graph.keys()


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


def run_program(program: str, folder: Path) -> str:
    """What a fresh process prints that finds modules in this folder, then in the checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    options = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, cwd=folder, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "names", ["kernels, acla.cli", "acla.cli, kernels", "acla.kernels.floor, kernels"]
)
def test_kernels_has_two_names_and_one_identity(tmp_path, names):
    program = (
        f"import {names}, acla.models.attention, kernels.floor, kernels.timing, sys\n"
        "import acla.kernels.timing, acla.kernels.baselines, kernels.baselines\n"
        f"own = {{m for m in sys.modules.values() if {str(ROOT / 'kernels')!r} in repr(m)}}\n"
        "print(len(own), len({m.__file__ for m in own}))\n"
        "print(acla.kernels is kernels, acla.kernels.timing is kernels.timing)"
    )
    modules, files, *same = run_program(program, tmp_path).split()
    assert modules == files
    assert same == ["True", "True"]


def test_another_package_called_kernels_may_be_there(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    program = (
        "import acla.cli, kernels, kernels.__init__, acla.models.attention, acla.kernels.timing\n"
        "print(kernels.__file__, acla.kernels.__file__, sep='\\n')"
    )
    theirs, ours = run_program(program, tmp_path).splitlines()
    assert Path(theirs).parent == tmp_path / "kernels"
    assert Path(ours).parent == ROOT / "kernels"


def test_everything_imports_without_triton(tmp_path):
    modules = [m for m in SOURCES if room(m) != "kernels"] + ["kernels", *SCRIPTS]
    program = (
        "import sys; sys.modules['triton'] = None\n"
        f"import {', '.join(modules)}\n"
        "import torch\n"
        "rows = [torch.ones(1, 4, 4, 2)]\n"
        "print(kernels.attend(rows, torch.zeros(1, 2, 2, 1, 3, 2)).aggregate.sum().item())"
    )
    assert float(run_program(program, tmp_path)) == 8
