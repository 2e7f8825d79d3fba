"""What the tests share: few threads, honest uninitialised memory, pictures made up and real."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are modules too
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
from acla import cli  # noqa: E402

with torch.device("meta"):
    torch.empty(0)  # torch notes its constructors at the first use, which must be the real ones


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def empty_holds_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads memory of torch.empty that nobody wrote shall see NaN."""
    empty = torch.empty

    def filled(*args: object, **options: object) -> torch.Tensor:
        tensor = empty(*args, **options)
        with torch.no_grad():
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture(autouse=True)
def interruptible() -> None:
    """A process that was started in the background ignores Ctrl-C; tests of it send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_threads() -> None:
    """Every test begins with as many threads, whatever the one before did: bits depend on them."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def commands_take_the_cpu() -> Iterator[None]:
    """Commands run on the CPU unless a test names a GPU, where bits vary from run to run."""
    pick = cli.pick_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "pick_device", lambda name: pick("cpu" if name == "auto" else name))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real pictures: ACLA_DATA, or ../shared/data beside the project."""
    given = os.environ.get("ACLA_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not (folder / "benchmark").is_dir():
        pytest.skip(f"no real pictures: ACLA_DATA is not set and {folder} holds no benchmark/")
    return folder


def scene(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] with slopes, edges and some noise: a picture that needs no file."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = []
    for channel in range(channels):
        slope = 90 + 60 * np.sin(x / 7 + channel) + 50 * np.cos(y / (5 + channel))
        edge = np.where((x + 2 * y + 3 * channel) % 23 < 9, 55, 0)
        planes.append(slope + edge + rng.normal(0, 6, (height, width)))
    levels = np.stack(planes, 2).clip(0, 255).round().astype(np.uint8)
    return levels[:, :, 0] if channels == 1 else levels


@pytest.fixture
def make_scene() -> Callable[..., np.ndarray]:
    return scene


@pytest.fixture
def make_picture() -> Callable[..., torch.Tensor]:
    """scene() as the project holds pictures: float32 [C, H, W] in 0..1."""

    def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
        levels = np.atleast_3d(scene(height, width, channels, seed))
        return torch.from_numpy(levels.astype(np.float32)).permute(2, 0, 1).contiguous() / 255

    return picture


@pytest.fixture
def small_sets(tmp_path: Path, make_scene: Callable[..., np.ndarray]) -> list[str]:
    """Flags for pictures so small that training is mostly training."""
    for name in ("T/a", "T/b", "T/c", "V/v"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(make_scene(40, 33, seed=ord(path.stem))).save(path)
    return ["--train-set", "T", "--val-set", "V", "--data", str(tmp_path)]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of its own, where runs/ begins empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACLA_DATA", raising=False)


@pytest.fixture
def root(tmp_path: Path, make_scene: Callable[..., np.ndarray]) -> Path:
    """A folder with the set Mine: colour of odd size, gray, RGBA."""
    folder = tmp_path / "data" / "Mine"
    folder.mkdir(parents=True)
    Image.fromarray(make_scene(37, 30)).save(folder / "colour.png")
    Image.fromarray(make_scene(32, 41, 1, 1)).save(folder / "gray.bmp")
    Image.fromarray(make_scene(26, 28, 3, 2)).convert("RGBA").save(folder / "withalpha.png")
    return tmp_path / "data"
