"""Export of a model file, as ONNX for use without this package (extra `onnx`), or as a program of
torch.export, which needs `import acla.kernels` for its attention:

    python -m acla.export model.safetensors model.onnx
    python -m acla.export model.safetensors model.pt2

The network takes `pictures` [B,C,H,W] in 0..1, of any B, H and W, and gives `restored`
[B,C,H·scale,W·scale], which may pass 0..1 a little. In ONNX, attention is expressed by standard
operators, a GridSample for each key. The result is compared with the network at three sizes before
it is written."""

import argparse
import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from acla import cli
from acla.console import say
from acla.errors import AclaError, UsageError
from acla.files import write_atomically
from acla.models.serialization import Checkpoint, load_model

OPSET = 18
FLOAT, DOUBLE = 1, 11  # ONNX's numbers of types
SIZES = ((1, 17, 24), (1, 40, 33), (2, 9, 8))  # B, H, W that the result is compared at
TOLERANCE = 1e-4

Value = Any  # of an ONNX graph


def attend(
    features: Sequence[Value],
    points: Value,
    mask_maps: Sequence[Value],
    gates: None,
    seeds: None,
    temperature: float,
    backend: str,
    counts: bool,
) -> tuple[Value, Value, Value]:
    """`acla.kernels.attend` in operators of ONNX, without gates, noise and counts of keys."""
    from onnxscript import opset18 as op

    one, axis = op.Constant(value_float=1.0), op.Constant(value_ints=[3])
    sizes = [op.Shape(points, start=n, end=n + 1) for n in (1, 2)]
    pixels = []  # y [H,1,1] and x [W,1] of the queries, with H and W
    for size, shape in zip(sizes, ([-1, 1, 1], [-1, 1]), strict=True):
        real = op.Squeeze(op.Cast(size, to=FLOAT))
        line = op.Range(op.Constant(value_float=0.0), real, one)
        pixels.append((op.Reshape(line, op.Constant(value_ints=shape)), real))
    sums, coverage = [], []
    for l, of_layer in enumerate(unstack(op, points, len(features), 3)):
        *offsets, logits = unstack(op, of_layer, 3, 3)
        inside, grid = one, []
        for (pixel, size), offset in zip(pixels, offsets, strict=True):
            p = op.Add(pixel, offset)  # [B,H,W,K]
            share = op.Min(op.Add(p, one), op.Sub(size, p))
            inside = op.Mul(inside, op.Clip(share, op.Constant(value_float=0.0), one))
            # GridSample's −1 and 1 are the outer edges of the map, border included.
            two, three = op.Constant(value_float=2.0), op.Constant(value_float=3.0)
            scaled = op.Div(op.Add(op.Mul(p, two), three), op.Add(size, two))
            grid.append(op.Unsqueeze(op.Sub(scaled, one), op.Constant(value_ints=[-1])))
        grid = op.Concat(*reversed(grid), axis=-1)  # [B,H,W,K,2]
        weight = op.Softmax(logits, axis=-1)
        if mask_maps:
            weight = op.Mul(weight, open_keys(op, mask_maps[l], grid, sizes))
        value = op.Transpose(features[l], perm=[0, 3, 1, 2])
        total, K = None, points.shape[-1]
        for where, w in zip(unstack(op, grid, K, 3), unstack(op, weight, K, 3), strict=True):
            key = op.GridSample(value, where, align_corners=0)
            key = op.Mul(key, op.Unsqueeze(w, op.Constant(value_ints=[1])))
            total = key if total is None else op.Add(total, key)
        sums.append(op.Unsqueeze(op.Transpose(total, perm=[0, 2, 3, 1]), axis))
        coverage.append(op.ReduceSum(op.Mul(weight, inside), axis))
    uncounted = op.Cast(op.ReduceSum(coverage[0], op.Constant(value_ints=[1, 2])), to=DOUBLE)
    return op.Concat(*sums, axis=3), op.Concat(*coverage, axis=3), uncounted


def unstack(op: Any, value: Value, count: int, axis: int) -> list[Value]:
    """The slices of a value along an axis of that many."""
    numbers = (op.Constant(value_int=n) for n in range(count))
    return [op.Gather(value, number, axis=axis) for number in numbers]


def open_keys(op: Any, mask_map: Value, grid: Value, sizes: list[Value]) -> Value:
    """The masks [B,H,W,K] as 0 and 1 (Eq. 7 and 8), key k from channel k of the map."""
    each = op.Transpose(mask_map, perm=[0, 3, 1, 2])
    channels = op.Shape(each, start=0, end=2)
    pairs, one = op.Constant(value_ints=[-1]), op.Constant(value_ints=[1])
    each = op.Reshape(each, op.Concat(pairs, one, op.Shape(each, start=2), axis=0))
    grid = op.Transpose(grid, perm=[0, 3, 1, 2, 4])
    grid = op.Reshape(grid, op.Concat(pairs, op.Shape(grid, start=2), axis=0))
    beta = op.GridSample(each, grid, padding_mode="border", align_corners=0)
    beta = op.Transpose(op.Reshape(beta, op.Concat(channels, *sizes, axis=0)), perm=[0, 2, 3, 1])
    return op.Cast(op.Greater(beta, op.Constant(value_float=0.0)), to=FLOAT)


def to_program(network: Checkpoint) -> ExportedProgram:
    """A network for pictures of any batch, height and width."""
    pictures = torch.rand(2, network.config.channels, 12, 14)
    dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    with torch.enable_grad():  # whose way has no views that ONNX lacks
        return torch.export.export(network.model, (pictures,), dynamic_shapes=dynamic)


def header(network: Checkpoint) -> dict[str, str]:
    """What an exported file says of its network, as JSON."""
    return {name: json.dumps(asdict(getattr(network, name))) for name in ("task", "config")}


def to_pt2(network: Checkpoint) -> bytes:
    """The file of a network that torch.export.load reads, with the extra files task and config."""
    file = io.BytesIO()
    torch.export.save(to_program(network), file, extra_files=header(network))
    return file.getvalue()


def to_onnx(network: Checkpoint) -> bytes:
    """The ONNX file of a network, its configuration and task among the metadata."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    exported = torch.onnx.export(
        to_program(network),
        dynamo=True,
        opset_version=OPSET,
        input_names=["pictures"],
        output_names=["restored"],
        custom_translation_table={torch.ops.acla.attend.default: attend},
        optimize=False,  # onnxruntime does it
        verbose=False,
    )
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of source, with this machine's paths
    exported.model.metadata_props.update(header(network))
    return exported.model_proto.SerializeToString()


def loaded(data: bytes, suffix: str) -> Callable[[Tensor], Tensor]:
    """The restored pictures of an exported file's bytes."""
    if suffix == ".pt2":
        return torch.export.load(io.BytesIO(data)).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["restored"], {"pictures": x.numpy()})[0])


@torch.no_grad()
def compare(network: Checkpoint, restore: Callable[[Tensor], Tensor]) -> list[float]:
    """How far exported answers lie from the network's at most, for noise of each of SIZES."""
    generator, apart = torch.Generator().manual_seed(0), []
    for B, H, W in SIZES:
        pictures = torch.rand(B, network.config.channels, H, W, generator=generator)
        apart.append(float((restore(pictures) - network.model(pictures)).abs().max()))
    return apart


# Command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.export", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a model file, .safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write, .onnx or .pt2")
    cli.add_overwrite(parser, "OUT")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    cli.check_output(args.out, args.overwrite, ".onnx", ".pt2")
    network, suffix = load_model(args.file), args.out.suffix.lower()
    try:
        if suffix == ".onnx":
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error}: ONNX files need pip install '.[onnx]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch's own ways
        data = (to_onnx if suffix == ".onnx" else to_pt2)(network)
        apart = compare(network, loaded(data, suffix))
    told = ", ".join(
        f"{most:.1e} at {B}×{H}×{W}" for most, (B, H, W) in zip(apart, SIZES, strict=True)
    )
    if not all(most <= TOLERANCE for most in apart):
        raise AclaError(f"{args.file}: exported, it is off by {told}, which is a bug: report it")
    write_atomically(args.out, data)
    say(f"{args.out}: {network.task}, {len(data):,} bytes; off the network by at most {told}")


if __name__ == "__main__":
    cli.run(main)
