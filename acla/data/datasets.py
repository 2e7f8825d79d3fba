"""Sets of pictures by name, and patches of them as a function of (seed, step)."""

import atexit
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import skimage
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from acla.config import Task
from acla.data.degradations import degrade, patch_offset, window_side
from acla.data.image import SUFFIXES, fit_channels, from_levels, load, round_8bit, to_levels
from acla.errors import AclaError, DataError, UsageError

UNKNOWN_MEMORY = 8 * 2**30  # bytes, where the system does not report its size
MAX_WORKERS = 4  # where their number is not given
# Where a set is looked for, in this order; the last ones are EDSR-PyTorch's and BasicSR's
LAYOUTS = ("{name}", "benchmark/{name}", "train/{name}", "benchmark/{name}/HR", "{name}/HR")
LAYOUTS += ("{name}/GTmod12", "benchmark/{name}/GTmod12", "{name}/{name}_train_HR")
# Natural pictures of scikit-image by split; the motorcycles are one scene, never divided
SAMPLE = {
    "train": (
        *("astronaut.png", "brick.png", "grass.png", "gravel.png", "moon.png"),
        *("motorcycle_left.png", "motorcycle_right.png"),
    ),
    "val": ("coins.png", "rocket.jpg"),
    "test": ("camera.png", "chelsea.png", "coffee.png"),
}


# Sets by name


def find_set(name: str, root: str | Path | None, split: str = "test") -> list[Path]:
    """The pictures of a set, sorted by name.

    Raises DataError with the expected and the present folders. `root` holds the sets in one of
    LAYOUTS. The built-in set `sample` needs no root, and alone has splits: train, val, test.
    """
    if name == "sample":
        return sample_set(split)
    if not name or name in (".", ".."):
        raise UsageError(f"{name!r} is no name of a set")
    if root is None:
        raise DataError(
            f"set {name!r} needs a folder of pictures: give --data DIR or set ACLA_DATA "
            "(only 'sample' is built in and needs no files)"
        )
    root = Path(root)
    for layout in LAYOUTS:
        if paths := pictures_in(root / layout.format(name=name)):
            return paths
    raise DataError(missing_set(name, root))


def sample_set(split: str) -> list[Path]:
    """The built-in pictures of a split: files of the installed scikit-image, never downloaded."""
    if split not in SAMPLE:
        raise UsageError(f"unknown split {split!r}; known: {', '.join(SAMPLE)}")
    paths = [Path(skimage.data_dir) / name for name in SAMPLE[split]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"set 'sample': scikit-image {skimage.__version__} lacks {', '.join(missing)}; "
            "install scikit-image from its wheel, or name a set of your own"
        )
    return paths


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted by name, without hidden ones."""
    if not folder.is_dir():
        return []
    files = (f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())
    return sorted((f for f in files if not f.name.startswith(".")), key=lambda f: f.name)


def known_sets(root: Path) -> list[str]:
    """The names under which find_set finds pictures below root."""
    folders = [root, root / "benchmark", root / "train"]
    names = {sub.name for folder in folders if folder.is_dir() for sub in folder.iterdir()}
    names = {name for name in names if not name.startswith(".")} - {"benchmark", "train"}
    return sorted(n for n in names if any(pictures_in(root / x.format(name=n)) for x in LAYOUTS))


def missing_set(name: str, root: Path) -> str:
    """The message for a missing set: the expected folders, the present ones, and the fix."""
    folders = [root / layout.format(name=name) for layout in LAYOUTS]
    expected = "\n".join(f"  {folder}/*.png" for folder in folders)
    if root.is_dir():
        empty = [f"  {folder} holds no picture\n" for folder in folders if folder.is_dir()]
        present = "".join(empty) + f"  sets: {', '.join(known_sets(root)) or 'none'}"
    else:
        present = f"  {root} is no folder"
    return (
        f"set {name!r} was not found\nexpected one of (PNG, BMP, TIFF or JPEG):\n{expected}\n"
        f"found:\n{present}\nfix: name one of these sets, or the folder that holds {name!r} "
        "by --data DIR or the variable ACLA_DATA"
    )


def split_every(paths: Sequence[Path], nth: int) -> tuple[list[Path], list[Path]]:
    """(the others, every nth picture in sorted order, at least the last). Raises DataError."""
    ordered = sorted(paths)
    if len(ordered) < 2:
        raise DataError(
            f"{len(ordered)} picture(s) cannot be split into training and validation: add pictures "
            "to the training set, or name a set for validation (train.py: --val-set)"
        )
    apart = ordered[nth - 1 :: nth] or ordered[-1:]
    return [path for path in ordered if path not in apart], apart


def training_sets(
    train_set: str, val_set: str | None, root: str | Path | None
) -> tuple[list[Path], dict[str, list[Path]]]:
    """The pictures to train on, and those of every validation set by its name.

    val_set: one name or several, A,B. Without any, `sample` uses its own split, and every tenth
    picture of any other set is for validation.
    """
    training = find_set(train_set, root, "train")
    if val_set is not None:
        return training, {name: find_set(name, root, "val") for name in val_set.split(",")}
    if train_set == "sample":
        return training, {train_set: sample_set("val")}
    training, validation = split_every(training, 10)
    return training, {train_set: validation}


def match_stems(originals: list[Path], folder: Path) -> dict[Path, Path]:
    """original → prediction: the stems are equal, or the prediction's starts with the original's.

    A prediction belongs to the longest stem that it starts with. Raises DataError with the names.
    """
    files = pictures_in(folder)
    longest_first = sorted(originals, key=lambda path: -len(path.stem))
    matches: dict[Path, list[Path]] = {path: [] for path in originals}
    for file in files:
        owner = next((path for path in longest_first if file.stem.startswith(path.stem)), None)
        if owner:
            matches[owner].append(file)
    for path, own in matches.items():
        matches[path] = [file for file in own if file.stem == path.stem] or own
    missing = [path.name for path, own in matches.items() if not own]
    if missing:
        raise DataError(
            f"{folder}: no prediction for {', '.join(missing)} (of {len(files)} pictures there, "
            "none has a name that starts like the original's)"
        )
    several = [f"{p.name} ({', '.join(f.name for f in fs)})" for p, fs in matches.items() if fs[1:]]
    if several:
        raise DataError(f"{folder}: more than one prediction for {'; '.join(several)}")
    return {path: own[0] for path, own in matches.items()}


# Decoded pictures


def quarter_of_memory() -> int:
    """A quarter of the machine's memory in bytes, shared by its torchrun processes."""
    total = UNKNOWN_MEMORY
    if hasattr(os, "sysconf"):  # not on Windows
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Pictures:
    """Pictures uint8 [1 or 3, H, W], decoded on demand and kept while they fit in `memory` bytes
    (default: a quarter of the machine's). An unreadable file raises PictureError, which names it.
    """

    def __init__(self, paths: Sequence[Path], memory: int | None = None) -> None:
        self.paths = list(paths)
        self.memory = quarter_of_memory() if memory is None else memory
        self.used = 0
        self.kept: OrderedDict[int, np.ndarray] = OrderedDict()
        if not self.paths:
            raise DataError("a set without pictures")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        if index in self.kept:
            self.kept.move_to_end(index)
            return self.kept[index]
        levels = np.atleast_3d(to_levels(load(self.paths[index]))).transpose(2, 0, 1)
        levels = np.ascontiguousarray(levels)
        if levels.nbytes <= self.memory:
            self.kept[index] = levels
            self.used += levels.nbytes
            while self.used > self.memory:
                self.used -= self.kept.popitem(last=False)[1].nbytes
        return levels


# Patches


@functools.lru_cache(maxsize=4)
def order(seed: int, walk: int, count: int) -> np.ndarray:
    """The order of the pictures in one pass through the set."""
    return np.random.default_rng((seed, 1, walk)).permutation(count)


def cut_window(levels: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A random [C, side, side] window of levels [C, H, W]; a smaller picture is mirrored."""
    _, height, width = levels.shape
    y = int(rng.integers(max(height - side, 0) + 1))
    x = int(rng.integers(max(width - side, 0) + 1))
    cut = levels[:, y : y + side, x : x + side]
    lack = [(0, 0), (0, side - cut.shape[1]), (0, side - cut.shape[2])]
    return np.pad(cut, lack, mode="symmetric") if cut.shape[1:] != (side, side) else cut


def augment(picture: np.ndarray, which: int) -> np.ndarray:
    """One of the 8 flips and rotations of [C, H, W]; `which` is 0..7, and 0 changes nothing."""
    picture = np.rot90(picture, which % 4, axes=(1, 2))
    return picture[:, :, ::-1] if which >= 4 else picture


class PatchSampler:
    """Batches of degraded patches and their targets, a pure function of (seed, step).

    Pictures are walked through without repetition, each walk in another seeded order; window, flip
    and rotation, JPEG phase and noise of patch `index` come from (seed, step, index) alone. Process
    `rank` of `world` makes the patches whose index it owns, so that the batch over all processes
    does not depend on their number.

    patch: side of a low-quality patch in pixels; batch: patches over all processes, a multiple of
    world; channels: of the network's pictures, where not the task's own.
    """

    def __init__(
        self,
        pictures: Pictures,
        task: Task,
        patch: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        channels: int | None = None,
    ) -> None:
        self.pictures, self.task, self.patch, self.size = pictures, task, patch, batch
        self.seed = seed % 2**64  # numpy takes no negative seeds
        self.channels = channels or task.channels
        share = batch // world
        self.indices = range(rank * share, (rank + 1) * share)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(degraded [B, C, p, p], target [B, C, p·scale, p·scale]) of one step, float32."""
        rngs = [np.random.default_rng((self.seed, 0, step, index)) for index in self.indices]
        windows = torch.stack(
            [self.window(step, index, rng) for index, rng in zip(self.indices, rngs, strict=True)]
        )
        # Shrinking draws nothing, so one call serves all patches
        shrunk = degrade(windows, self.task) if self.task.name == "sr" else None
        pairs = []
        for i, rng in enumerate(rngs):
            y, x = patch_offset(self.task, rng, self.channels)
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            low = degrade(windows[i], self.task, generator) if shrunk is None else shrunk[i]
            pairs.append(
                (cut(low, y, x, self.patch, 1), cut(windows[i], y, x, self.patch, self.task.scale))
            )
        degraded, target = zip(*pairs, strict=True)
        return torch.stack(degraded), torch.stack(target)

    def picture(self, step: int, index: int) -> int:
        """The number of the picture that patch `index` of a step is cut from."""
        walk, place = divmod(step * self.size + index, len(self.pictures))
        return int(order(self.seed, walk, len(self.pictures))[place])

    def names(self, step: int) -> list[str]:
        """The files that a step's patches are cut from, in all processes, in the batch's order."""
        return [self.pictures.paths[self.picture(step, i)].name for i in range(self.size)]

    def window(self, step: int, index: int, rng: np.random.Generator) -> Tensor:
        """The clean, augmented window [C, side, side] that patch `index` is made from."""
        picture = self.pictures[self.picture(step, index)]
        cut_out = cut_window(picture, window_side(self.task, self.patch, self.channels), rng)
        clean = fit_channels(from_levels(augment(cut_out, int(rng.integers(8)))), self.channels)
        return round_8bit(clean) if self.task.name == "car" else clean


def cut(picture: Tensor, y: int, x: int, side: int, scale: int) -> Tensor:
    """The patch [C, side·scale, side·scale] at (y, x), in low-quality pixels, of [C, H, W]."""
    return picture[:, y * scale : (y + side) * scale, x * scale : (x + side) * scale]


def fingerprint(paths: Iterable[Path]) -> str:
    """A short fingerprint of a set, by names and sizes of its files, for runs that resume."""
    listed = ((path.name, os.path.getsize(path)) for path in paths)
    return hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()[:16]


class Batches(Dataset):
    """A sampler's batches; the index is the step. An error that the user can mend is returned in
    place of a batch, so that it leaves a worker as it is."""

    def __init__(self, sampler: PatchSampler, workers: int):
        self.sampler = sampler
        self.parent = lifeline(os.getpid()) if workers else None

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | AclaError:
        try:
            return self.sampler.batch(step)
        except AclaError as error:
            return error


class Loader:
    """A sampler's batches on `device`, which worker processes make before they are needed.

    A batch is a function of its step alone, so the number of workers changes no bit of it; without
    workers a batch is made on demand. For a GPU the batches lie in pinned memory, so that the
    copy waits for nothing.
    """

    def __init__(self, sampler: PatchSampler, device: torch.device, workers: int | None = None):
        self.sampler, self.device = sampler, device
        self.workers = default_workers(device) if workers is None else workers
        if self.workers < 0:
            raise UsageError(f"--workers must be 0 or more, not {self.workers}")
        self.next_step = -1
        self.batches: Iterator = iter(())

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(degraded, target) of one step, as PatchSampler.batch makes them, on the device. Steps in
        order are fast; any other one starts the workers anew. Raises DataError, PictureError."""
        if step != self.next_step:
            loader = DataLoader(
                Batches(self.sampler, self.workers),
                batch_size=None,
                sampler=range(step, 2**62),
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=start_worker,
            )
            self.batches = iter(loader)
        self.next_step = step + 1
        batch = next(self.batches)
        if isinstance(batch, AclaError):
            raise batch
        low, target = batch
        return low.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)


def start_worker(worker: int) -> None:
    """In a worker process: share the memory for pictures with the other workers. Ctrl-C and
    SIGTERM, which often go to every process of a run, are left to the one that trains."""
    info = get_worker_info()
    info.dataset.sampler.pictures.memory //= info.num_workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    reader, writer = info.dataset.parent
    writer.close()
    threading.Thread(target=end_after, args=(reader,), daemon=True).start()


@functools.cache
def lifeline(pid: int) -> tuple[Connection, Connection]:
    """A pipe whose writing end closes when this process exits or dies. Its workers, which ignore
    SIGTERM, wait for that at the reading end."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    atexit.register(writer.close)
    return reader, writer


def end_after(reader: Connection) -> None:
    reader.poll(None)
    os._exit(0)


def default_workers(device: torch.device) -> int:
    """0 on a CPU, whose cores train; for a GPU four, or as many as its process has cores."""
    if device.type == "cpu":
        return 0
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MAX_WORKERS, cores))
