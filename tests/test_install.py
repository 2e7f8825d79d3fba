"""The built package: it works from any folder and beside the published package `kernels`."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PARTS = ("acla", "kernels", "tests", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
NETWORK = "car-rgb-q5-95-none"  # for photos in colour
LOST = (  # files of the package kernels that are gone
    "from importlib.metadata import files; "
    "print([str(file) for file in files('kernels') if not file.locate().is_file()])"
)
COMMANDS = "from importlib.metadata import entry_points as all; " + (
    "print(*[e.name for e in all(group='console_scripts') if e.name[:5] == 'acla-' and e.load()])"
)
WHERE = "from importlib.util import find_spec; print(find_spec('acla').origin)"


def run(folder: Path, *command: object) -> str:
    """What a command prints that runs in this folder and knows nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def wheels(tmp_path) -> dict[str, Path]:
    """The published wheel `kernels`, and ours `acla`, built from the source archive."""
    work = tmp_path / "build"
    tree = work / "tree"
    (tree / "weights").mkdir(parents=True)
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", work, "kernels"]
    if subprocess.run(fetch, capture_output=True, check=False).returncode:
        pytest.skip("no package index: pip cannot download kernels")
    shipped = ROOT / "weights"
    parts = [*(ROOT / part for part in PARTS), *ROOT.glob("*.py"), *shipped.glob(f"{NETWORK}.*")]
    for path in [*parts, shipped / "README.md"]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tree / path.relative_to(ROOT))
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(work)!r})"
    run(tree, sys.executable, "-c", program)
    (archive,) = work.glob("acla-*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {Path(*Path(name).parts[1:]) for name in packed.getnames()}
    assert {path.relative_to(ROOT) for path in (ROOT / "tests").glob("*.py")} <= names
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


@pytest.mark.slow
def test_the_package_lives_beside_kernels_and_has_commands(wheels, environment, elsewhere):
    python = environment / "python"
    pip = (python, "-m", "pip")

    def install(name: str) -> None:
        """Whether or not the packages that the environment sees have it too."""
        run(environment, *pip, "install", "--no-deps", "--no-compile", "-I", wheels[name])

    def check_ours(*restore: object) -> None:
        assert NETWORK in run(elsewhere, *restore, "in.jpg", "out.png", "--overwrite")
        assert Image.open(elsewhere / "out.png").size == (31, 24)
        assert str(environment.parent) in run(elsewhere, python, "-c", WHERE)

    def check_theirs() -> None:
        assert run(environment, python, "-c", LOST).strip() == "[]"

    install("acla")
    install("kernels")
    check_ours(python, "-m", "acla.restore")
    check_theirs()
    run(elsewhere, *pip, "uninstall", "-y", "acla")
    check_theirs()
    install("acla")
    check_theirs()
    run(elsewhere, *pip, "uninstall", "-y", "kernels")
    check_ours(environment / "acla-restore")
    assert "--sizes" in run(elsewhere, python, "-m", "acla.kernels.bench", "--help")
    names = run(elsewhere, python, "-c", COMMANDS).split()
    assert sorted(names) == ["acla-evaluate", "acla-restore", "acla-search", "acla-train"]
