"""Tile sizes: the lists, the default that needs no tuning, and the choices saved per GPU.

B batch · L referred layers · K sampled keys per layer and query · H,W grid, N = H·W · C channels

`python -m kernels.autotune` times every configuration on the GPU that is there and saves the best
in the user's cache directory ($ACLA_CACHE); kernels/tuned.json is the repository's copy. A choice
depends on the GPU's name, the features' type, K, C and a class of sizes, never on H or W: every
picture has its own size. Without a saved choice the first configuration of a list is taken.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.cache import cache_directory, is_writable

REPOSITORY_COPY = Path(__file__).with_name("tuned.json")
VECTOR = 16  # bytes that one thread loads at once
KEYS_OF_TILE = 16
NARROWEST = 16  # channels of the least tile, where there are as many
# What users meet, as (B, H, W, C, L, K): a patch, a batch of patches, a picture; EDSR, RCAN, CLA.
SIZES = [
    (B, H, W, C, L, K)
    for C, L, K in ((256, 5, 16), (64, 4, 16), (128, 5, 16), (256, 5, 8), (64, 4, 8))
    for B, H, W in ((1, 48, 48), (16, 48, 48), (1, 256, 256))
]
SMALL, LARGE = 1 << 15, 1 << 18  # queries times layers times images, that divide sizes in classes


class Config(NamedTuple):
    """A program's tile, in queries (or list entries) times channels, and its warps.

    No channels: the tile's other dimension is all K keys, and `rows` is for KEYS_OF_TILE of them.
    """

    rows: int
    channels: int
    warps: int


# Eight values to a thread come first: they leave registers for many warps to wait side by side.
GATHER = [(16, 64, 4), (32, 64, 8), (8, 128, 4), (32, 32, 4), (32, 64, 4), (16, 128, 4)]
KEYS = [(32, 0, 8), (16, 0, 4), (32, 0, 4), (16, 0, 2)]
CONFIGS: dict[str, list[Config]] = {
    name: [Config(*values) for values in listed]
    for name, listed in {
        "_plan": KEYS,
        "_spread": KEYS,
        "_count": KEYS,
        "_aggregate": GATHER,
        "_dots": [(16, 32, 4), (16, 64, 4), (32, 32, 4), (32, 32, 8)],
        "_scatter": GATHER,
        "_sum_rows": [(8, 64, 2), (8, 128, 4), (4, 64, 1)],
        "_sum_maps": [(16, 0, 2), (32, 0, 4)],
    }.items()
}


class Call(NamedTuple):
    """One launch of a kernel, all but its tile."""

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, int, int]  # rows (queries, or pixels to sum for), layers, images
    rows_block: str | None = "BLOCK_N"  # None: a program owns one row, and takes BLOCK_E entries

    @property
    def name(self) -> str:
        return self.kernel.__name__

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
        blocks = self.blocks(config, lanes)
        options = {"num_warps": config.warps, "enable_fp_fusion": True}
        self.kernel[self.programs(blocks)](**self.arguments, **blocks, **options)


hooks: list[Callable[[Call], None]] = []  # the last one gets the calls instead of the GPU


@contextmanager
def recording(hook: Callable[[Call], None]) -> Iterator[None]:
    """Inside, launches are handed to `hook` and do not run."""
    hooks.append(hook)
    try:
        yield
    finally:
        hooks.pop()


def launch(call: Call) -> None:
    """Run a kernel with the tile chosen for it."""
    if hooks:
        hooks[-1](call)
        return
    device = next(a for a in call.arguments.values() if isinstance(a, torch.Tensor)).device
    name, lanes = hardware(device)
    call.run(choose(name, call.name, call_key(call)), lanes)


@functools.cache
def hardware(device: torch.device) -> tuple[str, int]:
    """A GPU's name and the lanes of its warps; of a CPU, which interprets, what costs least."""
    if device.type != "cuda":
        return device.type, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.warp_size


def call_key(call: Call) -> str:
    """What a choice is saved under: the kernel, the type it loads, K, C and the class of sizes."""
    K, C = call.arguments["K"], call.arguments.get("C", 0)
    return key_of(call.name, call.dtype, K, C, call.size_class)


@functools.cache
def key_of(kernel: str, dtype: torch.dtype, K: int, C: int, size_class: str) -> str:
    dtype_name = str(dtype).removeprefix("torch.")
    return f"{kernel.strip('_')} {dtype_name} K{K} C{C} {size_class}"


@functools.cache
def choose(gpu: str, kernel: str, key: str) -> Config:
    """The saved choice for this GPU, the user's before the repository's; else the default."""
    for path in (user_copy(), REPOSITORY_COPY):
        saved = read_choices(path).get(gpu, {}).get(key)
        if saved is not None:
            return Config(*saved)
    return CONFIGS[kernel][0]


def candidates(call: Call, lanes: int) -> list[Config]:
    """The configurations worth timing: each tile once, the default first."""
    tiles: dict[tuple, Config] = {}
    for config in CONFIGS[call.name]:
        tiles.setdefault((*call.blocks(config, lanes).values(), config.warps), config)
    return list(tiles.values())


def tune(
    calls: Sequence[Call], lanes: int, timer: Callable[[Callable[[], None]], float]
) -> dict[str, list[int]]:
    """The configuration with the least time by `timer` (any unit) for each kernel and kind of size,
    as it is saved: the sum counts where a kernel is launched more than once. A tie goes to the
    earlier one."""
    chosen = {}
    for key, group in itertools.groupby(sorted(calls, key=call_key), call_key):
        group = list(group)

        def time(config: Config, group: list[Call] = group) -> float:
            # A scatter adds to its buffer again and again, which takes as long as the first time.
            return sum(timer(functools.partial(call.run, config, lanes)) for call in group)

        chosen[key] = list(min(candidates(group[0], lanes), key=time))
    return chosen


def problem(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Features, points, mask maps, gates and seeds of (B, H, W, C, L, K): offsets of a few pixels,
    half of the keys kept."""
    B, H, W, C, L, K = size
    generator = torch.Generator(device).manual_seed(0)
    made = {"generator": generator, "device": device}
    features = [torch.randn(B, H + 2, W + 2, C, **made).to(dtype) for _ in range(L)]
    points = 2 * torch.randn(B, H, W, L, 3, K, **made)
    maps = [torch.randn(B, H + 2, W + 2, K, **made) for _ in range(L)]
    return features, points, maps, torch.ones(L, device=device), torch.arange(B, device=device)


def trace(inputs: tuple, run: bool) -> list[Call]:
    """The launches of a forward pass, of both backward passes and of a count. Where they do not
    `run`, they are only listed, and no GPU is needed."""
    from kernels import accounting, gpu

    features, points, maps, _, seeds = inputs
    wanted = ([True] * len(features), True, [True] * len(maps), True)
    calls: list[Call] = []

    def note(call: Call) -> None:
        calls.append(call)
        if run:  # the next launches read what this one writes
            call.run(CONFIGS[call.name][0], hardware(points.device)[1])

    before = torch.are_deterministic_algorithms_enabled()
    with recording(note):
        try:
            gradients = tuple(torch.ones_like(result) for result in gpu.forward(*inputs))
            accounting.count(points, maps, seeds)
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                gpu.backward(*inputs, 1.0, gradients, wanted)
        finally:
            torch.use_deterministic_algorithms(before)
    return calls


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


def save_choices(path: Path, gpu: str, chosen: dict[str, list[int]]) -> None:
    """Add choices to a file, which appears whole or not at all."""
    choices = read_choices(path)
    choices[gpu] = {**choices.get(gpu, {}), **chosen}
    rows = (
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table.items()))
        + "\n  }"
        for name, table in sorted(choices.items())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(rows) + "\n}\n")
    os.replace(file.name, path)
    choose.cache_clear()


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


def show() -> str:
    """The saved choices and where they lie, and the defaults."""
    lines = []
    for path in (user_copy(), REPOSITORY_COPY):
        choices = read_choices(path)
        lines.append(f"{path}: {', '.join(choices) or 'nothing'}")
        for gpu, table in choices.items():
            lines += [f"  {gpu}: {key}: {tuple(saved)}" for key, saved in sorted(table.items())]
    lines.append("without a saved choice (queries or entries, channels, warps):")
    lines += [f"  {name.strip('_')}: {tuple(listed[0])}" for name, listed in CONFIGS.items()]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.autotune", description="Find the fastest tiles for this GPU."
    )
    parser.add_argument("--device", default="cuda", help="the GPU to tune for (default: cuda)")
    parser.add_argument(
        "--out", type=Path, default=user_copy(), help="where to save (default: %(default)s)"
    )
    parser.add_argument("--show", action="store_true", help="print the choices and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(arguments)
    if options.show:
        print(show())
        return 0
    if options.device.split(":")[0] not in ("cpu", "cuda"):
        print(f"--device {options.device}: known are cuda, cuda:0 and so on", file=sys.stderr)
        return 2
    if not options.device.startswith("cuda") or not torch.cuda.is_available():
        print(
            f"There is no GPU to tune for on {options.device!r}. The kernels run with their default"
            " tiles, or with those of kernels/tuned.json for GPUs listed there (--show).",
            file=sys.stderr,
        )
        return 1
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: there is nothing to tune", file=sys.stderr)
        return 1
    if not is_writable(options.out.parent):
        print(f"{options.out} cannot be written; name a file with --out", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    device = torch.device(options.device)
    gpu, lanes = hardware(device)
    timer = functools.partial(do_bench, warmup=5, rep=20, return_mode="median")
    with torch.cuda.device(device):
        for size, dtype in itertools.product(SIZES, (torch.float32, torch.bfloat16, torch.float16)):
            chosen = tune(trace(problem(size, dtype, device), run=True), lanes, timer)
            save_choices(options.out, gpu, chosen)
            for key, saved in chosen.items():
                print(f"{gpu}: {key}: {tuple(saved)}")
    return 0


if __name__ == "__main__":
    from kernels import autotune

    sys.exit(autotune.main())  # the module that the launchers know, not this second copy of it
