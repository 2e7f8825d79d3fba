"""Time the operator: `python -m kernels.bench`. Correctness first; a backend that is wrong is not
timed.

Every backend of `attend` runs beside what users do today: `grid_sample`, once per layer and once
per key (the faster one counts), `deform_conv2d` with an identity kernel per key where torchvision
is installed, and one 3×3 convolution of the same width. Contenders take turns within each
repetition, so that the machine's moods hit all of them. On a GPU the operator's kernels are timed
without their launches, and stand beside their floor (floor.py); whole networks run as they are and
as CUDA graphs.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

import argparse
import functools
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from kernels import available_backends, floor
from kernels.baselines import (
    KEYS,
    LAYERS,
    Case,
    by_backend,
    by_convolution,
    by_grid_sample,
    contenders,
    make_case,
)
from kernels.ratios import Row, ratios
from kernels.timing import paired, peak_mb, percentiles, replay

SIZES = ("1x48x48x256", "1x256x256x64", "16x48x48x64", "1x96x96x128")
KEEP = (1.0, 0.5, 0.25)
PASSES = ("forward", "both")
# EDSR 32 × 256, EDSR 16 × 64 and RCAN at the positions of Table 9; multiply-adds at 48 × 48.
NETWORKS = {
    "edsr-32x256": ("sr", "paper", "edsr"),
    "edsr-16x64": ("car", "small", "edsr"),
    "rcan-10x20x64": ("sr", "paper", "rcan"),
}


# Measuring


def run_pass(contender: Callable[[Case], Tensor], case: Case, which: str) -> list[Tensor]:
    """One forward pass, or one forward and backward pass with every gradient; returns the
    results."""
    if which == "forward":
        with torch.no_grad():
            return [contender(case)]
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    out = contender(case)
    gradient = case.gradient
    if out.shape != gradient.shape:  # the convolution's
        gradient = gradient[..., 0, :].permute(0, 3, 1, 2)
    grads = torch.autograd.grad(out, inputs, gradient, allow_unused=True)
    for tensor in inputs:
        tensor.requires_grad_(False)
    return [out.detach(), *(g for g in grads if g is not None)]


def what_is_wrong(contender: Callable[[Case], Tensor], case: Case) -> str | None:
    """Compare a contender with the float64 reference on a small case, forward and every gradient:
    the first tensor that is wrong, and by how much; None without any."""
    exact_case = Case(
        [f.double() for f in case.features],
        case.points.double(),
        [m.double() for m in case.mask_maps],
        case.gradient.double(),
    )
    exact = run_pass(by_backend("reference"), exact_case, "both")
    # A few roundings of the widest sum that leads to an element, in the features' type.
    tolerance = 64 * torch.finfo(case.features[0].dtype).eps
    for i, (ours, right) in enumerate(zip(run_pass(contender, case, "both"), exact, strict=True)):
        if 1 <= i <= LAYERS:  # the border's gradient leads nowhere: `to_rows` drops it
            ours, right = ours[:, 1:-1, 1:-1], right[:, 1:-1, 1:-1]
        error = (ours.double() - right).abs().max() / right.abs().max().clamp(min=1e-30)
        if not error <= tolerance:
            what = "the result" if i == 0 else f"gradient {i}"
            return f"{what} is off by {error:.1e}, where {tolerance:.1e} is allowed"
    return None


def right_ones(
    found: dict[str, Callable[[Case], Tensor]], case: Case
) -> dict[str, Callable[[Case], Tensor]]:
    """The contenders that are right, for nothing wrong is timed: a rival that is not is left out
    and told (others' kernels have bugs that come and go with versions, types and sizes), and for a
    backend of ours that is not, SystemExit is raised."""
    right = {}
    for name, contender in found.items():
        wrong = what_is_wrong(contender, case)
        if wrong and name in available_backends():
            raise SystemExit(f"{name} is wrong: {wrong}")
        if wrong:
            print(f"{name} is left out, for it is wrong: {wrong}", file=sys.stderr)
        else:
            right[name] = contender
    return right


# Rows


def operator_rows(size: tuple[int, int, int, int], args: argparse.Namespace) -> Iterator[Row]:
    """Every contender on one size, forward and forward and backward, half of the keys kept; then
    the fastest of ours at every share of kept keys."""
    dtype = getattr(torch, args.dtype)
    small = make_case((1, 13, 11, size[3]), 0.5, dtype, args.device)
    found = right_ones(contenders(args.device), small)
    found["conv3x3"] = by_convolution
    best = next(iter(found))
    for which in PASSES:
        case = make_case(size, 0.5, dtype, args.device)
        keep = case.kept()
        cases = [(name, contender, case, keep) for name, contender in found.items()]
        yield from timed_cases(cases, size, which, args)
    for which in PASSES:
        cases = [make_case(size, keep, dtype, args.device) for keep in KEEP]
        cases = [(best, found[best], case, case.kept()) for case in cases]
        yield from timed_cases(cases, size, which, args)


def timed_cases(
    cases: list[tuple[str, Callable[[Case], Tensor], Case, float]],
    size: tuple[int, int, int, int],
    which: str,
    args: argparse.Namespace,
) -> Iterator[Row]:
    """A row for each contender with its name, case and share of kept keys, all of one size, timed
    in turns; on a GPU, with the work that there is and the share of the floor that was reached."""
    B, H, W, C = size
    problems = []
    for name, contender, case, keep in cases:
        row = described(name, size, which, args, args.dtype, keep)
        if args.device == "cuda" and name != "conv3x3":
            dtype = getattr(torch, args.dtype)
            passes = floor.works(B, LAYERS, KEYS, H, W, C, keep, dtype, which)
            row |= floor.fields(passes, floor.gpu_of(torch.cuda.get_device_properties()))
        problems.append((row, functools.partial(run_pass, contender, case, which)))
    yield from measured(problems, args, queued=True)


def described(
    name: str,
    size: tuple[int, int, int, int],
    which: str,
    args: argparse.Namespace,
    dtype: str = "float32",
    keep: float = 1.0,
) -> Row:
    """What a row says before anything is measured."""
    B, H, W, C = size
    row = {"device": device_name(args.device), "threads": torch.get_num_threads()}
    row |= {"dtype": dtype, "B": B, "L": LAYERS, "K": KEYS, "H": H, "W": W, "C": C}
    return row | {"keep": round(keep, 4), "backend": name, "pass": which}


def measured(
    problems: list[tuple[Row, Callable[[], object]]], args: argparse.Namespace, queued: bool = False
) -> Iterator[Row]:
    """The rows with times, taken in turns, and memory."""
    works = [work for _, work in problems]
    times = paired(works, args.device, args.seconds, queued=queued)
    for (row, work), taken in zip(problems, times, strict=True):
        row = row | percentiles(taken)
        # A graph has its memory from the start.
        row["peak_mb"] = None if row["pass"] == "replay" else peak_mb(work, args.device)
        if "floor_ms" in row:
            row["floor_share"] = round(row["floor_ms"] / row["ms_p50"], 4)
        show(row)
        yield row


def network_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Whole networks on one 48×48 picture, without and with ACLA at Table 9's positions; on a GPU
    also as graphs, which are replayed."""
    from dataclasses import replace

    from acla.config import PAPER_POSITIONS, Task, model_preset
    from acla.models.backbones import Backbone

    for name, (task, preset, backbone) in NETWORKS.items():
        config = model_preset(preset, Task(task, {"sr": 2, "car": 10}[task]), backbone)
        plain = replace(config, attention="none", keys=0)
        inserted = replace(config, positions=PAPER_POSITIONS[task, backbone])
        picture = torch.rand(1, config.channels, 48, 48, device=args.device)
        works = {}
        for label, network in ((name, plain), (f"{name} + acla", inserted)):
            net = Backbone(network).eval().to(args.device, memory_format=torch.channels_last)
            works[label] = functools.partial(without_gradients, net, picture)
        for which in ("network", "replay")[: 1 + (args.device == "cuda")]:
            problems = []
            for label, work in works.items():
                row = described(label, (1, 48, 48, config.width), which, args)
                problems.append((row, replay(work) if which == "replay" else work))
            yield from measured(problems, args)


def without_gradients(net: torch.nn.Module, picture: Tensor) -> Tensor:
    with torch.no_grad():
        return net(picture)


def supernet_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Time and memory of one weight step of the supernet, 16 blocks × 64, 136 pairs, batch 16,
    48×48: with every gate open, and with every second one shut, its module computed nevertheless or
    skipped. Beside it what `grid_sample` saves for backward in one pair, times the pairs."""
    from acla.config import ModelConfig
    from acla.search.supernet import Supernet

    size = (16, 48, 48, 64)
    net = Supernet(ModelConfig(blocks=16, width=64, channels=1)).train().to(args.device)
    pictures = torch.rand(16, 1, 48, 48, device=args.device)
    every = torch.ones(16, device=args.device)
    half = every * (torch.arange(16, device=args.device) % 2)
    seeds = torch.arange(16, device=args.device)

    def step(gates: Tensor) -> None:
        restored, kept = net(pictures, gates, seeds)
        (restored.square().mean() + net.cost(kept, 48 * 48).log()).backward()
        net.zero_grad(set_to_none=True)

    steps = {
        "supernet step": every,
        "supernet step, half shut, all computed": half.clone().requires_grad_(),
        "supernet step, half shut, skipped": half,
    }
    works = [
        (described(name, size, "both", args), functools.partial(step, gates))
        for name, gates in steps.items()
    ]
    yield from measured(works, args)
    case = make_case(size, 1.0, torch.float32, args.device)
    one = Case(case.features[:1], case.points[:, :, :, :1], case.mask_maps[:1], case.gradient)
    saved = min(saved_mb(by_grid_sample(per_key), one) for per_key in (False, True))
    pairs = 16 * 17 // 2
    row = described(f"grid_sample, saved tensors of {pairs} pairs", size, "both", args)
    row |= {"ms_p20": None, "ms_p50": None, "ms_p80": None, "peak_mb": round(saved * pairs, 1)}
    show(row)
    yield row


def saved_mb(contender: Callable[[Case], Tensor], case: Case) -> float:
    """Megabytes that autograd keeps for the backward pass, every storage once, the inputs left
    out."""
    for tensor in case.inputs:
        tensor.requires_grad_()
    inputs = {tensor.untyped_storage().data_ptr() for tensor in case.inputs}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = contender(case)
    del out
    return sum(size for pointer, size in kept.items() if pointer not in inputs) / 1e6


def device_name(device: str) -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}"


def show(row: Row) -> None:
    """A row as it is measured, on standard error."""
    print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--sizes",
        default=",".join(SIZES),
        help=f"BxHxWxC, several with commas (default: {','.join(SIZES)})",
    )
    parser.add_argument(
        "--only",
        choices=("operator", "networks", "supernet"),
        help="one part (default: all three)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the features (default: float32)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="least time for each comparison (default: 3)"
    )
    parser.add_argument(
        "--json", metavar="FILE|-", help="write the rows there; - is standard output"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: no CUDA device is available; use --device cpu")
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
        if any(len(size) != 4 or min(size) < 1 for size in sizes):
            raise ValueError
    except ValueError:
        refuse(f"--sizes {args.sizes}: sizes are BxHxWxC, for instance {SIZES[0]}")
    if args.json not in (None, "-") and not Path(args.json).parent.is_dir():
        refuse(f"--json {args.json}: there is no folder {Path(args.json).parent}")
    if args.json not in (None, "-") and Path(args.json).is_dir():
        refuse(f"--json {args.json}: that is a folder; name a file in it")
    if args.threads < 1:
        refuse(f"--threads must be 1 or more, not {args.threads}")
    torch.set_num_threads(args.threads)
    rows = written(all_rows(sizes, args), args.json)
    if args.json == "-":
        return
    clock = "processor time" if args.threads == 1 else "wall time"
    clock = "GPU time" if args.device == "cuda" else clock
    print(f"{device_name(args.device)}, {args.threads} CPU thread(s), medians of {clock}")
    print("\n".join(ratios(rows)))


def all_rows(sizes: list[tuple[int, ...]], args: argparse.Namespace) -> Iterator[Row]:
    """The rows of the parts that were asked for, one by one as they are measured."""
    if args.only in (None, "operator"):
        for size in sizes:
            yield from operator_rows(size, args)
    if args.only in (None, "networks"):
        yield from network_rows(args)
    if args.only in (None, "supernet"):
        yield from supernet_rows(args)


def written(rows: Iterable[Row], path: str | None) -> list[Row]:
    """The rows, each of which is in the file (or on the output) as soon as it is measured: what
    fails later, for want of memory for instance, takes none with it. A file that is there is
    replaced at the first row."""
    from acla.files import commit

    stamp = {"commit": commit()}
    done = []
    for row in rows:
        line = json.dumps(stamp | row)
        if path == "-":
            print(line, flush=True)
        elif path:
            with open(path, "a" if done else "w", encoding="utf-8") as file:
                file.write(line + "\n")
        done.append(row)
    return done


def refuse(message: str) -> NoReturn:
    """Stop: the call was wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
