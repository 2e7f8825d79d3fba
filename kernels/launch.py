"""Launches of the Triton kernels: tile sizes, their defaults, and the choices saved per GPU.

B batch · L referred layers · K sampled keys per layer and query · H,W grid, N = H·W · C channels

A choice depends on the GPU's name, the features' type, K, C and a class of sizes, never on H or W:
every picture has its own size. The user's choices ($ACLA_CACHE, else the user's cache directory)
come before the repository's (kernels/tuned.json); without either the first configuration of a list
is taken. `kernels.autotune` makes them.
"""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cache import cache_directory

REPOSITORY_COPY = Path(__file__).with_name("tuned.json")
VECTOR = 16  # bytes that one thread loads, stores or adds to memory with one instruction
KEYS_OF_TILE = 16
NARROWEST = 16  # channels of the least tile, where there are as many
SMALL, LARGE = 1 << 15, 1 << 18  # queries times layers times images, that divide sizes in classes


class Config(NamedTuple):
    """A program's tile, in queries (or list entries) times channels, and its warps.

    No channels: the tile's other dimension is all K keys, and `rows` is for KEYS_OF_TILE of them.
    """

    rows: int
    channels: int
    warps: int


# Tiles of one warp come first: it waits for no other warp, and for few queries' longest lists. For
# float32 and 16 keys its threads have four values each; those of `_spread` two, to save registers.
GATHER_TILES = [(2, 64, 1), (4, 64, 1), (4, 128, 2), (8, 128, 4), (1, 256, 1), (32, 64, 8)]
KEY_TILES = [(32, 0, 8), (16, 0, 4), (16, 0, 2)]
CONFIGS: dict[str, list[Config]] = {
    name: [Config(*values) for values in listed]
    for name, listed in {
        "_pad": [(16, 64, 4), (32, 64, 4), (8, 128, 4)],
        "_plan": [(8, 0, 1), (4, 0, 1), *KEY_TILES],
        "_spread": [(4, 0, 1), (8, 0, 1), *KEY_TILES],
        "_count": [(8, 0, 1), (4, 0, 1), *KEY_TILES],
        "_aggregate": GATHER_TILES,
        "_dots": [(4, 32, 1), (2, 64, 1), (8, 64, 2), (4, 128, 2), (16, 32, 4), (32, 32, 8)],
        "_scatter": GATHER_TILES,
        "_sum_rows": [(4, 64, 1), (8, 64, 2), (8, 128, 4)],
        "_sum_maps": [(8, 0, 1), (4, 0, 1), (32, 0, 4)],
    }.items()
}


class Launch(NamedTuple):
    """One launch of a kernel, all but its tile."""

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, int, int]  # rows (queries, or pixels to sum for), layers, images
    rows_block: str | None = "BLOCK_N"  # None: a program owns one row, and takes BLOCK_E entries

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def device(self) -> torch.device:
        given = (a if isinstance(a, tuple) else (a,) for a in self.arguments.values())
        return next(a for part in given for a in part if isinstance(a, torch.Tensor)).device

    @property
    def size_class(self) -> str:
        rows = self.grid[0] * self.grid[1] * self.grid[2]
        return "small" if rows < SMALL else "medium" if rows < LARGE else "large"

    @property
    def dtype(self) -> torch.dtype:
        """The type that the tile loads."""
        wide = self.arguments.get("features") or (self.arguments.get("grad_ptr"),)
        return torch.float32 if wide[0] is None else wide[0].dtype

    def blocks(self, config: Config, lanes: int) -> dict[str, int]:
        """The tile, for warps of so many lanes: as asked, but with rows enough to give every
        thread a load of 16 bytes (of one value, where C forbids that)."""
        rows_block = self.rows_block or "BLOCK_E"
        if not config.channels:
            keys = power_of_two(self.arguments["K"])
            return {rows_block: max(1, config.rows * KEYS_OF_TILE // keys), "BLOCK_K": keys}
        channels = channel_block(self.arguments["C"], config.channels)
        vector = VECTOR // self.dtype.itemsize
        vector = vector if self.arguments["C"] % vector == 0 else 1
        least = lanes * config.warps * vector // channels
        rows = config.rows if self.rows_block is None else max(config.rows, least)
        return {rows_block: rows, "BLOCK_C": channels}

    def programs(self, blocks: dict[str, int]) -> tuple[int, int, int]:
        """The grid: rows and channels along its first axis, which alone may pass 65,535."""
        rows, layers, images = self.grid
        tiles = -(-rows // blocks.get(self.rows_block, 1))
        chunks = -(-self.arguments["C"] // blocks["BLOCK_C"]) if "BLOCK_C" in blocks else 1
        return tiles * chunks, layers, images

    def run(self, config: Config, lanes: int) -> None:
        blocks, options = self.blocks(config, lanes), options_of(config)
        self.kernel[self.programs(blocks)](**self.arguments, **blocks, **options)

    def compile(self, config: Config, lanes: int) -> None:
        """Fill Triton's cache on disk; nothing runs."""
        blocks, options = self.blocks(config, lanes), options_of(config)
        grid = self.programs(blocks)
        self.kernel.warmup(grid=grid, **self.arguments, **blocks, **options)


def options_of(config: Config) -> dict[str, Any]:
    """What the compiler is told besides the tile."""
    return {"num_warps": config.warps, "enable_fp_fusion": True}


hooks: list[Callable[[Launch], None]] = []  # the last one gets the calls instead of the GPU


@contextmanager
def recording(hook: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, launches are handed to `hook` and do not run."""
    hooks.append(hook)
    try:
        yield
    finally:
        hooks.pop()


def launch(
    kernel: Any, grid: tuple[int, int, int], rows_block: str | None = "BLOCK_N", **arguments: Any
) -> None:
    """Run a kernel with the tile chosen for it; grid and rows_block as in `Launch`."""
    call = Launch(kernel, arguments, grid, rows_block)
    if hooks:
        hooks[-1](call)
        return
    name, lanes = hardware(call.device)
    call.run(choose_config(name, call.name, call_key(call)), lanes)


@functools.cache
def hardware(device: torch.device) -> tuple[str, int]:
    """A GPU's name and the lanes of its warps; of a CPU, which interprets, what costs least."""
    if device.type != "cuda":
        return device.type, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.warp_size


def call_key(call: Launch) -> str:
    """What a choice is saved under: the kernel, the type it loads, K, C and the class of sizes."""
    K, C = call.arguments.get("K", 0), call.arguments.get("C", 0)
    return key_of(call.name, call.dtype, K, C, call.size_class)


@functools.cache
def key_of(kernel: str, dtype: torch.dtype, K: int, C: int, size_class: str) -> str:
    dtype_name = str(dtype).removeprefix("torch.")
    return f"{kernel.strip('_')} {dtype_name} K{K} C{C} {size_class}"


@functools.cache
def choose_config(gpu: str, kernel: str, key: str) -> Config:
    """The saved choice for this GPU, the user's before the repository's; else the default. For a
    CPU, which interprets, the tile of most rows: every program costs it the same."""
    for path in (user_copy(), REPOSITORY_COPY):
        saved = read_choices(path).get(gpu, {}).get(key)
        if saved is not None:
            return Config(*saved)
    listed = CONFIGS[kernel]
    return max(listed) if gpu == "cpu" else listed[0]


def read_choices(path: Path) -> dict[str, dict[str, list[int]]]:
    """GPU name → key → configuration; empty where the file is missing or is no such table."""
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))
        return {
            gpu: {key: list(valid(Config(*saved))) for key, saved in table.items()}
            for gpu, table in choices.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def valid(config: Config) -> Config:
    """The configuration, if its numbers are powers of two (or no channels); else ValueError."""
    rows, channels, warps = config
    if any(power_of_two(number) != number for number in (rows, channels or 1, warps)):
        raise ValueError(f"not a tile: {config}")
    return config


def user_copy() -> Path:
    """tuned.json in $ACLA_CACHE, else in the user's cache directory."""
    return cache_directory() / "tuned.json"


def channel_block(C: int, most: int) -> int:
    """The power of two up to `most` that leaves the fewest lanes idle; the largest of several."""
    whole = power_of_two(C)
    sizes = [size for size in (most >> i for i in range(8)) if NARROWEST <= size <= whole]
    return min(sizes or [whole], key=lambda size: -(-C // size) * size)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
