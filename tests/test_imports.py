"""Who may import whom, read from the sources; and a fresh process without Triton."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parents[1]
ROOMS = {path.stem for path in (ROOT / "acla").glob("*.py")} - {"__init__"}
SCRIPTS = ("train", "search", "evaluate")
FREE = {"errors"}  # names of what a user can mend; any room of acla may raise them

# Left may import right; nothing else.
ALLOWED = {
    "errors": set(),
    "stopping": set(),
    "config": set(),
    "flags": {"config"},
    "cost": {"config"},
    "architecture": {"config", "flags"},
    "metrics": set(),
    "image": set(),
    "degrade": {"image", "config"},
    "data": {"degrade", "image", "config"},
    "protocol": {"metrics", "degrade", "image", "config"},
    "gate": {"kernels"},
    "attention": {"kernels", "gate"},
    "rivals": {"attention", "cost"},
    "backbone": {"attention", "rivals", "config", "gate", "kernels"},
    "han": {"backbone", "config"},
    "a2n": {"backbone", "config"},
    "networks": {"a2n", "backbone", "config", "cost", "han"},
    "supernet": {"backbone", "gate", "cost", "config", "networks"},
    "checkpoint": {"backbone", "config", "networks"} | {"cli", "importing"},  # for its command
    "importing": {"backbone", "checkpoint", "cli", "config", "han", "networks"},
    "photo": {"checkpoint", "image"},
    "colour": {"photo", "image", "config"},
    "jobs": {"image"},
    "weights": {"checkpoint", "config"},
    "tiles": {"backbone", "cli"},
    "restore": {
        "backbone",
        "checkpoint",
        "cli",
        "colour",
        "config",
        "degrade",
        "flags",
        "image",
        "jobs",
        "photo",
        "tiles",
        "weights",
    },
    "training": {
        "backbone",
        "checkpoint",
        "cli",
        "config",
        "data",
        "degrade",
        "flags",
        "image",
        "protocol",
        "restore",
    },
    "learner": {"backbone", "checkpoint", "config", "networks", "processes", "training"},
    "loader": {"cli", "config", "data", "flags", "learner", "processes"},
    "cli": {"config", "flags", "kernels", "stopping"},
    "processes": set(),
    "provenance": set(),
    "searching": {
        "architecture",
        "checkpoint",
        "cli",
        "config",
        "cost",
        "data",
        "gate",
        "loader",
        "processes",
        "provenance",
        "stopping",
        "supernet",
        "training",
    },
    "report": {"cli"},
    "page": {"checkpoint", "cli", "image", "jobs", "photo"},
    "attribution": {"a2n", "attention", "backbone", "cli", "config"},
    "figures": {"attribution", "cli", "jobs"},
    "explain": {
        "attribution",
        "checkpoint",
        "cli",
        "colour",
        "config",
        "degrade",
        "figures",
        "image",
        "jobs",
        "photo",
        "protocol",
        "restore",
        "tiles",
    },
    "scores": {"cli", "config"},
    "tables": {
        "architecture",
        "checkpoint",
        "cli",
        "config",
        "data",
        "degrade",
        "image",
        "kernels",
        "networks",
        "protocol",
        "provenance",
        "restore",
    },
    "runs": {"checkpoint", "config", "scores"},
    "compare": {"cli", "config", "networks", "runs"},
    "selection": {"checkpoint", "cli", "config", "cost", "data", "processes", "searching"},
}
STANDARD_LIBRARY_ONLY = ("errors", "config", "flags", "cost", "architecture")
TIMED = {"tables": {"kernels.timing", "kernels.timing.paired"}}  # as the benchmark times networks
KERNEL_PACKAGES = {"torch", "triton", "numpy", "kernels"}
# The benchmark times whole networks and a rival; it is a command, and nothing imports it.
BENCH_PACKAGES = KERNEL_PACKAGES | {"acla", "torchvision"}
# Inside kernels: the operator reaches its backends; they never see each other or the reference.
BACKENDS = {"reference", "cpu", "bags", "gpu", "sampling", "aggregation", "accounting"}


def imported(path: Path) -> set[str]:
    """Every module that a source names in an import, with its dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> set[str]:
    """The rooms of acla that a source imports, and `kernels` if it imports that."""
    found = {name.split(".")[1] for name in imported(path) if name.startswith("acla.")}
    kernels_too = any(name.split(".")[0] == "kernels" for name in imported(path))
    return found & ROOMS | ({"kernels"} if kernels_too else set())


def test_every_room_has_its_place_in_the_list():
    assert not ROOMS - ALLOWED.keys()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_in_one_direction(room):
    path = ROOT / "acla" / f"{room}.py"
    assert rooms(path) - FREE <= ALLOWED[room]
    inside = {name for name in imported(path) if name.startswith("kernels.")}
    assert inside <= {f"kernels.{name}" for name in kernels.__all__} | TIMED.get(room, set())


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_never_import_each_other(script):
    tops = {name.split(".")[0] for name in imported(ROOT / f"{script}.py")}
    assert not tops & set(SCRIPTS)
    assert "kernels" not in tops


@pytest.mark.parametrize("room", STANDARD_LIBRARY_ONLY)
def test_these_rooms_need_the_standard_library_only(room):
    tops = {name.split(".")[0] for name in imported(ROOT / "acla" / f"{room}.py")}
    assert tops <= sys.stdlib_module_names | {"acla"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_stand_alone(path):
    names = imported(path)
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert tops <= (BENCH_PACKAGES if path.stem in ("bench", "contenders") else KERNEL_PACKAGES)
    assert "kernels.bench" not in names
    assert "acla" not in tops or path.stem == "bench"
    if path.stem in {"reference", "cpu", "bags"}:
        others = {f"kernels.{name}" for name in BACKENDS} - {f"kernels.{path.stem}"}
        assert not names & others


def test_kernels_is_ours():
    assert Path(kernels.__file__).parent == ROOT / "kernels"


def test_everything_imports_without_triton():
    modules = [f"acla.{room}" for room in sorted(ROOMS)] + ["kernels", *SCRIPTS]
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
