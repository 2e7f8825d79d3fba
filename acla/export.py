"""Export of a model file for use without this package (extra `onnx`):

    python -m acla.export model.safetensors model.onnx

The network takes `pictures` [B,C,H,W] in 0..1, of any B, H and W, and gives `restored`
[B,C,H·scale,W·scale], which may pass 0..1 a little. Attention is expressed by standard operators, a
GridSample for each key. The result is compared with the network in onnxruntime before it is
written."""

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim

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


def to_onnx(network: Checkpoint) -> bytes:
    """The ONNX file of a network, its configuration and task among the metadata. Raises AclaError
    if onnxruntime's result differs by more than TOLERANCE."""
    pictures = torch.rand(2, network.config.channels, 12, 14)
    dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.enable_grad():  # whose way has no views that ONNX lacks
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            torch.export.export(network.model, (pictures,), dynamic_shapes=dynamic),
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
    for name in ("task", "config"):
        exported.model.metadata_props[name] = json.dumps(asdict(getattr(network, name)))
    return exported.model_proto.SerializeToString()


@torch.no_grad()
def compare(network: Checkpoint, data: bytes) -> float:
    """The largest difference between a network and its ONNX file, for noise of several SIZES."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    generator, apart = torch.Generator().manual_seed(0), 0.0
    for B, H, W in SIZES:
        pictures = torch.rand(B, network.config.channels, H, W, generator=generator)
        (restored,) = session.run(["restored"], {"pictures": pictures.numpy()})
        apart = max(apart, float(np.abs(restored - network.model(pictures).numpy()).max()))
    return apart


# Command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.export", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a model file, .safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write, .onnx")
    cli.add_overwrite(parser, "OUT")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    cli.check_output(args.out, args.overwrite, ".onnx")
    network = load_model(args.file)
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error}: ONNX files need pip install '.[onnx]'") from error
    data = to_onnx(network)
    apart = compare(network, data)
    if not apart <= TOLERANCE:
        raise AclaError(
            f"{args.file}: its ONNX form is off by {apart:.2g}, which is a bug: report it"
        )
    write_atomically(args.out, data)
    say(f"{args.out}: {network.task}, {len(data):,} bytes, within {apart:.1g} of the network")


if __name__ == "__main__":
    cli.run(main)
