"""Time the operator: `python -m kernels.bench`. Correctness first; a backend that is wrong is not
timed.

Every backend of `attend` runs beside what users do today: `grid_sample`, once per layer and once
per key (the faster one counts), `deform_conv2d` with an identity kernel per key where torchvision
is installed, and one 3×3 convolution of the same width. Contenders take turns within each
repetition, so that the machine's moods hit all of them.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

import argparse
import functools
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from kernels.contenders import (
    KEYS,
    LAYERS,
    Case,
    by_backend,
    by_convolution,
    by_grid_sample,
    contenders,
    make_case,
)
from kernels.timing import paired, peak_mb, percentiles

SIZES = ("1x48x48x256", "1x256x256x64", "16x48x48x64", "1x96x96x128")
KEEP = (1.0, 0.5, 0.25)
PASSES = ("forward", "both")
# EDSR 32 × 256, EDSR 16 × 64 and RCAN at the positions of Table 9; multiply-adds at 48 × 48.
NETWORKS = {
    "edsr-32x256": ("sr", "paper", "edsr"),
    "edsr-16x64": ("car", "small", "edsr"),
    "rcan-10x20x64": ("sr", "paper", "rcan"),
}


Row = dict[str, object]


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


def require_right(name: str, contender: Callable[[Case], Tensor], case: Case) -> None:
    """Compare a contender with the float64 reference on a small case, forward and every gradient.

    Raises SystemExit that names the tensor: a wrong kernel is never timed.
    """
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
            raise SystemExit(f"{name} is wrong: {what} is off by {error:.1e} of {tolerance:.1e}")


# Rows


def operator_rows(size: tuple[int, int, int, int], args: argparse.Namespace) -> list[Row]:
    """Every contender on one size, forward and forward and backward, half of the keys kept; then
    the fastest of ours at every share of kept keys."""
    dtype = getattr(torch, args.dtype)
    small = make_case((1, 13, 11, size[3]), 0.5, dtype, args.device)
    found = contenders(args.device)
    for name, contender in found.items():
        require_right(name, contender, small)
    found["conv3x3"] = by_convolution
    rows = []
    for which in PASSES:
        case = make_case(size, 0.5, dtype, args.device)
        works = {n: functools.partial(run_pass, c, case, which) for n, c in found.items()}
        rows += measured(works, size, case.kept(), which, args)
    best = next(iter(found))
    for which in PASSES:
        works, kept = {}, {}
        for keep in KEEP:
            case = make_case(size, keep, dtype, args.device)
            works[f"{best} keep {keep:g}"] = functools.partial(run_pass, found[best], case, which)
            kept[f"{best} keep {keep:g}"] = case.kept()
        for row in measured(works, size, 0.0, which, args):
            rows.append({**row, "keep": round(kept[row["backend"]], 4), "backend": best})
    return rows


def measured(
    works: dict[str, Callable[[], object]],
    size: tuple[int, int, int, int],
    keep: float,
    which: str,
    args: argparse.Namespace,
) -> list[Row]:
    """A row for each contender, timed in turns."""
    times = paired(works, args.device, args.seconds)
    B, H, W, C = size
    same = {"device": device_name(args.device), "threads": torch.get_num_threads()}
    same |= {"dtype": args.dtype, "B": B, "L": LAYERS, "K": KEYS, "H": H, "W": W, "C": C}
    rows = []
    for name, work in works.items():
        row = {**same, "keep": round(keep, 4), "backend": name, "pass": which}
        row |= {**percentiles(times[name]), "peak_mb": peak_mb(work, args.device)}
        show(row)
        rows.append(row)
    return rows


def network_rows(args: argparse.Namespace) -> list[Row]:
    """Whole networks on one 48×48 picture, without and with ACLA at Table 9's positions."""
    from dataclasses import replace

    from acla.backbone import Backbone
    from acla.config import PAPER_POSITIONS, Task, model_preset

    rows = []
    for name, (task, preset, backbone) in NETWORKS.items():
        config = model_preset(preset, Task(task, {"sr": 2, "car": 10}[task]), backbone)
        plain = replace(config, attention="none", keys=0)
        inserted = replace(config, positions=PAPER_POSITIONS[task, backbone])
        picture = torch.rand(1, config.channels, 48, 48, device=args.device)
        works = {}
        for label, network in ((name, plain), (f"{name} + acla", inserted)):
            net = Backbone(network).eval().to(args.device, memory_format=torch.channels_last)
            works[label] = functools.partial(without_gradients, net, picture)
        rows += measured(works, (1, 48, 48, config.width), 1.0, "network", args)
    return rows


def without_gradients(net: torch.nn.Module, picture: Tensor) -> Tensor:
    with torch.no_grad():
        return net(picture)


def supernet_rows(args: argparse.Namespace) -> list[Row]:
    """Memory of one training step of the supernet, 16 blocks × 64, 136 pairs, batch 16, 48×48;
    beside it what `grid_sample` saves for backward in one pair, times the pairs."""
    from acla.config import ModelConfig
    from acla.supernet import Supernet

    size = (16, 48, 48, 64)
    net = Supernet(ModelConfig(blocks=16, width=64, channels=1)).train().to(args.device)
    pictures = torch.rand(16, 1, 48, 48, device=args.device)
    gates = torch.ones(16, device=args.device)
    seeds = torch.arange(16, device=args.device)

    def step() -> None:
        restored, kept = net(pictures, gates, seeds)
        (restored.square().mean() + net.cost(kept, 48 * 48).log()).backward()
        net.zero_grad(set_to_none=True)

    rows = measured({"supernet step": step}, size, 1.0, "both", args)
    case = make_case(size, 1.0, torch.float32, args.device)
    one = Case(case.features[:1], case.points[:, :, :, :1], case.mask_maps[:1], case.gradient)
    saved = min(saved_mb(by_grid_sample(per_key), one) for per_key in (False, True))
    pairs = 16 * 17 // 2
    row = {**rows[0], "backend": f"grid_sample, saved tensors of {pairs} pairs"}
    row |= {"ms_p20": None, "ms_p50": None, "ms_p80": None, "peak_mb": round(saved * pairs, 1)}
    show(row)
    return [*rows, row]


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


# Ratios


def ratios(rows: list[Row]) -> list[str]:
    """What the rows say, one ratio a line: larger is better unless the line says otherwise."""
    lines = []
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = (row["B"], row["H"], row["W"], row["C"], row["pass"], row["keep"])
        groups.setdefault(key, {})[row["backend"]] = row
    for (B, H, W, C, which, _), group in groups.items():
        where = f"{B}×{H}×{W}, C {C}, {which}"
        grid = [r["ms_p50"] for n, r in group.items() if n.startswith("grid_sample p")]
        for name in ("cpp", "torch", "triton"):
            if grid and name in group:
                ours = group[name]["ms_p50"]
                line = (
                    f"{where}: {name} is {min(grid) / ours:.1f}× as fast as the better grid_sample"
                )
                if "deform_conv2d" in group:
                    line += f", {group['deform_conv2d']['ms_p50'] / ours:.1f}× as deform_conv2d"
                lines.append(
                    f"{line}, {group['conv3x3']['ms_p50'] / ours:.2f}× as one 3×3 convolution"
                )
        for name in NETWORKS:
            if name in group:
                share = group[f"{name} + acla"]["ms_p50"] / group[name]["ms_p50"]
                lines.append(f"{name} + acla takes {share:.3f} of {name}'s time (less is better)")
        step = group.get("supernet step")
        for name, row in group.items():
            if step and name.startswith("grid_sample, saved"):
                times = row["peak_mb"] / step["peak_mb"]
                lines.append(f"a supernet step needs 1/{times:.1f} of {name}")
    return lines + sparsity_ratios(rows)


def sparsity_ratios(rows: list[Row]) -> list[str]:
    """Time with a quarter of the keys kept over time with all."""
    lines = []
    full = [row for row in rows if row["keep"] > 0.99 and row["pass"] in PASSES]
    for row in full:
        for other in rows:
            same = all(row[k] == other[k] for k in ("B", "H", "W", "C", "backend", "pass"))
            if same and other["keep"] < 0.3 and row["ms_p50"]:
                share = other["ms_p50"] / row["ms_p50"]
                where = f"{row['B']}×{row['H']}×{row['W']}, C {row['C']}, {row['pass']}"
                lines.append(
                    f"{where}: {row['backend']} with {other['keep']:.0%} of the keys takes "
                    f"{share:.2f} of its time with all (less is better)"
                )
    return lines


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
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
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
    torch.set_num_threads(args.threads)
    rows = []
    if args.only in (None, "operator"):
        rows += [row for size in sizes for row in operator_rows(size, args)]
    if args.only in (None, "networks"):
        rows += network_rows(args)
    if args.only in (None, "supernet"):
        rows += supernet_rows(args)
    text = "".join(json.dumps({"commit": commit(), **row}) + "\n" for row in rows)
    if args.json == "-":
        print(text, end="")
        return
    if args.json:
        Path(args.json).write_text(text, encoding="utf-8")
    clock = "processor time" if args.threads == 1 else "wall time"
    print(f"{device_name(args.device)}, {args.threads} CPU thread(s), medians of {clock}")
    print("\n".join(ratios(rows)))


def refuse(message: str) -> NoReturn:
    """Stop: the call was wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def commit() -> str:
    """The commit that was measured, '+' after it if files differ; 'unknown' outside a
    repository."""
    here = Path(__file__).parent
    command = ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
