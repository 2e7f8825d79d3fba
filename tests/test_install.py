"""The built package: it works from any folder and beside the published package `kernels`."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PARTS = ("acla", "kernels", "weights", "pyproject.toml", "README.md", "LICENSE")
LOST = (  # files of the package kernels that are gone
    "from importlib.metadata import files; "
    "print([str(file) for file in files('kernels') if not file.locate().is_file()])"
)


def run(folder: Path, *command: object) -> str:
    """What a command prints that runs in this folder and knows nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """The published wheel `kernels`, and ours `acla`, built from the source archive."""
    work = tmp_path_factory.mktemp("build")
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", work, "kernels"]
    if subprocess.run(fetch, capture_output=True, check=False).returncode:
        pytest.skip("no package index: pip cannot download kernels")
    tree = work / "tree"
    tree.mkdir()
    for path in [*(ROOT / part for part in PARTS), *ROOT.glob("*.py")]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tree / path.name)
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(work)!r})"
    run(tree, sys.executable, "-c", program)
    (archive,) = work.glob("acla-*.tar.gz")
    run(work, sys.executable, "-m", "pip", "wheel", "--no-deps", archive)
    return {name: next(work.glob(f"{name}-*.whl")) for name in ("acla", "kernels")}


@pytest.fixture
def environment(tmp_path) -> Path:
    """The folder of the programs of a fresh environment that sees the packages of this one."""
    venv.create(tmp_path / "env")
    site = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")})
    Path(site, "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Path(sysconfig.get_path("scripts", vars={"base": str(tmp_path / "env")}))


@pytest.fixture
def elsewhere(tmp_path, make_scene) -> Path:
    """A folder with a photo, and with a package called kernels that cannot be imported."""
    folder = tmp_path / "elsewhere"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("raise ImportError('not this one')\n")
    Image.fromarray(make_scene(24, 31)).save(folder / "in.jpg", quality=10)
    return folder


def install(programs: Path, wheel: Path) -> None:
    """Install a wheel, whether or not the packages that the environment sees have it too."""
    run(programs, programs / "python", "-m", "pip", "install", "--no-deps", "-I", wheel)


def check(programs: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Our package restores a photo and knows its benchmark; theirs has all of its files."""
    python = programs / "python"
    if "acla" in names:
        said = run(folder, python, "-m", "acla.restore", "in.jpg", "out.png", "--overwrite")
        assert "car-rgb-q5-95-none" in said
        assert str(programs.parent) in run(
            folder, python, "-c", "import acla; print(acla.__file__)"
        )
        assert "--sizes" in run(folder, python, "-m", "acla.kernels.bench", "--help")
    if "kernels" in names:
        assert run(programs, python, "-c", LOST).strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("order", [("acla", "kernels"), ("kernels", "acla")])
def test_the_package_lives_beside_kernels(wheels, environment, elsewhere, order):
    for name in order:
        install(environment, wheels[name])
    check(environment, elsewhere, order)
    run(elsewhere, environment / "python", "-m", "pip", "uninstall", "-y", order[0])
    check(environment, elsewhere, order[1:])


@pytest.mark.slow
def test_scripts_are_commands(wheels, environment, elsewhere):
    install(environment, wheels["acla"])
    run(elsewhere, environment / "acla-restore", "in.jpg", "out.png")
    assert Image.open(elsewhere / "out.png").size == (31, 24)
    for name in ("search", "train", "evaluate"):
        assert f"usage: acla-{name}" in run(elsewhere, environment / f"acla-{name}", "--help")
