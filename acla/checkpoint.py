"""Import of published PyTorch files, as model files of this project (their format:
acla/models/serialization.py), and model files of half the size, with weights in float16:

    python -m acla.checkpoint import edsr_x2.pt edsr_x2.safetensors
    python -m acla.checkpoint half runs/train/model.safetensors small.safetensors

Published files may be of EDSR, RCAN, HAN, A2N and A2N-M, in the parameter names of their public
PyTorch releases. Published networks work on pictures in 0..255, ours on 0..1: with biases divided
by 255, convolutions and ReLUs turn pictures 255 times smaller into features 255 times smaller. Not
so the convolutions whose output a sigmoid turns into factors, which must stay the same: they keep
their biases, and our modules multiply their input by 255 (`FactorConvolution`, HAN's attentions).
The function is the same, to rounding."""

import argparse
import hashlib
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy._core.multiarray import scalar
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acla import cli
from acla.config import ModelConfig, Task
from acla.console import say
from acla.errors import CheckpointError, UsageError, one_line
from acla.models import serialization
from acla.models.backbones import LEVELS, Backbone
from acla.models.factory import build_network

# A tensor by which a network is recognised; HAN has RCAN's too
MARKS = {
    "AAB_trunk.0.conv_first.weight": "a2n",
    "la.gamma": "han",
    "body.0.body.0.body.0.weight": "rcan",
    "body.0.body.0.weight": "edsr",
}
SUPPORTED = "EDSR (EDSR-PyTorch), RCAN, HAN and A2N, as their authors published them"
WRAPPERS = ("state_dict", "model", "params")
PREFIXES = ("module.", "model.", "_orig_mod.")  # of parallel, wrapped and compiled networks
ALONE = "save its state_dict alone: torch.save(network.state_dict(), FILE)"
# Numbers of NumPy, which may lie beside the state_dict; the function's name is 1.x's or 2.x's
SCALARS = [
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")),
]
# Biases of convolutions whose output becomes factors
FACTORS = re.compile(r".*(conv_du\.\d|k2|tail\.\d\.2\.conv|csa)\.bias")


def convert(path: Path, scale: int | None = None) -> Backbone:
    """The network of a published file, for pictures in 0..1, in evaluation mode.

    scale: enlargement per side; the shapes of A2N are the same for ×2 and ×3. Raises
    CheckpointError for a file that is damaged, needs code, or holds no supported network,
    UsageError for a scale that is missing or not the file's."""
    tensors = read_published(path)
    kind = next((kind for name, kind in MARKS.items() if name in tensors), None)
    if kind is None:
        named = f", but a tensor {one_line(next(iter(tensors)))}" if tensors else ""
        raise CheckpointError(
            f"{path}: holds no supported network{named}; supported: {SUPPORTED}; from a file with "
            f"more in it, {ALONE}"
        )
    try:
        tensors = rename(tensors, kind)
        config = infer_config(tensors, kind)
        scales = infer_scales(tensors, config)
        small = "sub_mean.bias" in tensors and bool((tensors["sub_mean.bias"].abs() <= 1).all())
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, UsageError) as error:
        raise CheckpointError(
            f"{path}: has the names of {kind.upper()}, but not its tensors: {error!r}"
        ) from error
    if small:
        raise CheckpointError(
            f"{path}: its mean colour is that of pictures in 0..1; published files are for 0..255"
        )
    config = replace(config, scale=choose_scale(scales, scale, path))
    with torch.device("meta"):  # allocates nothing before names and shapes are compared
        network = build_network(config)
    serialization.load_strictly(network, tensors, path)
    to_unit_range(network)
    return network.eval()


# Reading


def read_published(path: Path) -> dict[str, Tensor]:
    """The tensors by name, without wrappers' prefixes and float32 where they were of half the size,
    of a PyTorch file or of another project's safetensors file. Code in a file is never run. Raises
    CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    for name in 2 * WRAPPERS:  # wrappers may be nested
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and (tensor.device.type, tensor.layout) == ("cpu", torch.strided)
        for name, tensor in content.items()
    ):
        raise CheckpointError(f"{path}: holds more than tensors by name (a state_dict); {ALONE}")
    for prefix in 2 * PREFIXES:  # nested too
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return serialization.widened(content)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Our own are refused: converting biases twice is wrong."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") == serialization.FORMAT:
                raise CheckpointError(f"{path}: one of our files already; use it as it is")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def read_pickle(path: Path) -> object:
    """The content of a PyTorch file of tensors and plain values."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SCALARS):
            warnings.simplefilter("ignore")  # damaged files warn too, before the one error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise CheckpointError(
                f"{path}: needs pickled code ({code[1]}), which is never run; {ALONE}"
            ) from error
        raise CheckpointError(
            f"{path}: not a whole PyTorch file of tensors ({type(error).__name__})"
        ) from error


# Recognising the network


def rename(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors under our names, in our shapes."""
    if kind == "han":
        kernel = tensors["csa.conv.weight"].flatten(0, 2)  # [1,1,3,3,3]
        own = {"csa.kernel": kernel, "csa.bias": tensors["csa.conv.bias"]}
        return {n: t for n, t in tensors.items() if not n.startswith("csa.conv.")} | own
    if kind != "a2n":
        return tensors
    own = {
        "conv_first": "head.0",
        "AAB_trunk": "body",
        "trunk_conv": f"body.{count_numbers(tensors, 'AAB_trunk')}",
        "conv_last": f"tail.{count_numbers(tensors, 'upconv', '')}",
    }
    for step in (1, 2):
        names = {"upconv": "1", "att": "2", "HRconv": "4"}
        own |= {f"{name}{step}": f"tail.{step - 1}.{place}" for name, place in names.items()}
    parts = [(*name.partition("."), tensor) for name, tensor in tensors.items()]
    return {own.get(first, first) + dot + rest: tensor for first, dot, rest, tensor in parts}


def count_numbers(tensors: dict[str, Tensor], name: str, dot: str = ".") -> int:
    """How many different numbers follow a name."""
    matches = (re.match(rf"{re.escape(name + dot)}(\d+)\.", other) for other in tensors)
    return len({match[1] for match in matches if match})


def infer_config(tensors: dict[str, Tensor], kind: str) -> ModelConfig:
    """The configuration that names and shapes imply, except the scale. May raise any error for
    tensors that are no network's; `load_strictly` compares all of them later."""
    width, channels = tensors["head.0.weight"].shape[:2]
    size = {"width": width, "channels": channels, "attention": "none", "keys": 0}
    size["blocks"] = blocks = count_numbers(tensors, "body") - 1
    match kind:
        case "edsr":
            size["residual_scale"] = 0.1 if (blocks, width) == (32, 256) else 1.0
        case "rcan" | "han":
            size["group_blocks"] = count_numbers(tensors, "body.0.body") - 1
            size["reduction"] = width // len(tensors["body.0.body.0.body.3.conv_du.0.weight"])
        case "a2n":
            size["reduction"] = width // len(tensors["body.0.ADM.0.weight"])
            kind = "a2n-m" if tensors["body.0.non_attention.weight"].shape[-1] == 1 else "a2n"
    return ModelConfig(backbone=kind, **size)


def infer_scales(tensors: dict[str, Tensor], config: ModelConfig) -> tuple[int, ...]:
    """The enlargements that a tail may compute."""
    if config.backbone in ("a2n", "a2n-m"):
        return (4,) if "tail.1.1.weight" in tensors else (2, 3)
    names = [f"tail.0.{layer}.weight" for layer in (0, 2, 4)]
    grown = tuple(len(tensors[name]) / config.width for name in names if name in tensors)
    if grown not in (known := {(4,): 2, (9,): 3, (4, 4): 4}):
        raise ValueError("its tail enlarges neither ×2 nor ×3 nor ×4")
    return (known[grown],)


def choose_scale(scales: tuple[int, ...], given: int | None, path: Path) -> int:
    """The given scale, if the network may have it, else its only one. Raises UsageError."""
    if given is None and len(scales) > 1:
        raise UsageError(f"{path}: its shapes fit ×2 and ×3: give --scale 2 or --scale 3")
    if given not in (None, *scales):
        known = " or ".join(f"×{scale}" for scale in scales)
        raise UsageError(f"--scale {given}: the network of {path} enlarges {known}")
    return given or scales[0]


@torch.no_grad()
def to_unit_range(network: Backbone) -> None:
    """Turn f(x) for pictures x in 0..255 into f(255 x) / 255 for those in 0..1."""
    for name, parameter in network.named_parameters():
        if name.endswith(".bias") and not FACTORS.fullmatch(name):
            parameter /= LEVELS


# Command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.checkpoint", __doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="import|half")
    published = f"convert a published PyTorch file to a model file: {SUPPORTED}"
    half = "store a model file's weights in float16, at half the size; they are read as float32"
    for name, summary, kind in (
        ("import", published, "a .pt, .pth or .safetensors file"),
        ("half", half, "a model file"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("file", type=Path, metavar="FILE", help=kind)
        text = "the file to write, .safetensors"
        command.add_argument("out", type=Path, metavar="OUT", help=text)
        cli.add_overwrite(command, "OUT")
    command = commands.choices["import"]
    text = "the network's task: all supported ones enlarge"
    command.add_argument("--task", choices=("sr",), default="sr", help=text)
    text = "enlargement per side; needed for A2N ×2 and ×3, whose shapes are the same"
    command.add_argument("--scale", type=int, choices=(2, 3, 4), help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if os.path.realpath(args.file) == os.path.realpath(args.out):
        raise UsageError(f"{args.file} and {args.out} are the same; OUT needs a place of its own")
    cli.check_output(args.out, args.overwrite)
    if args.command == "half":
        whole = serialization.load_model(args.file)
        model, config, task, info = whole.model.half(), whole.config, whole.task, whole.info
    else:
        model = convert(args.file, args.scale)
        config, task = model.config, Task(args.task, model.config.scale)
        digest = hashlib.sha256(args.file.read_bytes()).hexdigest()
        info = {"imported": args.file.name, "sha256": digest}
    serialization.save_model(args.out, model, config, task, info)
    params = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{args.out}: {task}, {config.backbone} of {config.blocks} blocks × {config.width}, "
        f"{params:,} parameters"
    )


if __name__ == "__main__":
    cli.run(main)
