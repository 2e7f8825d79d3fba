"""Networks that were published as PyTorch files, made into model files of this project:

    python -m acla.checkpoint import edsr_x2.pt edsr_x2.safetensors

Known are EDSR, RCAN, HAN, A2N and A2N-M, in the parameter names of their public PyTorch releases.
These work on pictures in 0..255, and ours on 0..1. Convolutions and ReLUs make features 255 times
smaller of smaller pictures if their biases are divided too. Where features are read to make factors
of 0..1, which shall stay, weights are multiplied instead and biases kept. That is the same
function, to rounding. HAN's layer attention, which no weight can convert, multiplies by 255
itself."""

import argparse
import hashlib
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acla.cli import run
from acla.config import ModelConfig, Task
from acla.console import say
from acla.errors import CheckpointError, UsageError
from acla.models.backbones import LEVELS, Backbone
from acla.models.factory import build_network
from acla.models.serialization import FORMAT, load_strictly, save_model

# A tensor that tells the network; HAN has RCAN's too
MARKS = {
    "AAB_trunk.0.conv_first.weight": "a2n",
    "la.gamma": "han",
    "body.0.body.0.body.0.weight": "rcan",
    "body.0.body.0.weight": "edsr",
}
KNOWN = "EDSR (EDSR-PyTorch), RCAN, HAN and A2N, as their authors published them"
WRAPPERS = ("state_dict", "model", "params")
# The biases of what makes factors of features
FACTORS = re.compile(r".*(conv_du\.\d|k2|tail\.\d\.2\.conv|csa)\.bias")


def import_network(path: Path, scale: int | None = None) -> Backbone:
    """The network of a published file, for pictures in 0..1, in evaluation mode.

    scale: enlargement per side, which the shapes of A2N ×2 and ×3 do not tell. Raises
    CheckpointError for a file that is broken, needs code, or is of no known network, UsageError for
    a scale that is missing or another than the file's."""
    tensors = read_published(path)
    kind = next((kind for name, kind in MARKS.items() if name in tensors), None)
    if kind is None:
        raise CheckpointError(f"{path}: of no network that is known; known: {KNOWN}")
    try:
        tensors = renamed(tensors, kind)
        config = find_config(tensors, kind)
        scales = find_scales(tensors, config)
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
    with torch.device("meta"):  # no memory before names and shapes are known to fit
        network = build_network(config)
    load_strictly(network, tensors, path)
    to_unit_range(network)
    return network.eval()


# Reading


def read_published(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file or of somebody else's safetensors file, by name. Code in a file
    is never run. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    found = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    for name in 2 * WRAPPERS:  # one may lie in another
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and (tensor.device.type, tensor.layout) == ("cpu", torch.strided)
        for name, tensor in found.items()
    ):
        raise CheckpointError(f"{path}: holds other things than tensors by name (a state_dict)")
    parallel = all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if parallel else name: t for name, t in found.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file that is not ours: biases must not be converted twice."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT:
                raise CheckpointError(f"{path}: one of our files already; use it as it is")
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def read_pickle(path: Path) -> object:
    """What a PyTorch file holds, if that is made of tensors and plain values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken files too; one line will tell
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its next step raises
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise CheckpointError(
                f"{path}: needs pickled code ({code[1]}), which is never run; only files that hold "
                "a state_dict alone can be read"
            ) from error
        raise CheckpointError(
            f"{path}: not a whole PyTorch file of tensors ({type(error).__name__})"
        ) from error


# Which network it is


def renamed(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors by our names, in our shapes."""
    if kind == "han":
        kernel = tensors["csa.conv.weight"].flatten(0, 2)  # [1,1,3,3,3]
        given = {"csa.kernel": kernel, "csa.bias": tensors["csa.conv.bias"]}
        return {n: t for n, t in tensors.items() if not n.startswith("csa.conv.")} | given
    if kind != "a2n":
        return tensors
    own = {
        "conv_first": "head.0",
        "AAB_trunk": "body",
        "trunk_conv": f"body.{count(tensors, 'AAB_trunk')}",
        "conv_last": f"tail.{count(tensors, 'upconv', '')}",
    }
    for step in (1, 2):
        names = {"upconv": "1", "att": "2", "HRconv": "4"}
        own |= {f"{name}{step}": f"tail.{step - 1}.{place}" for name, place in names.items()}
    parts = [(*name.partition("."), tensor) for name, tensor in tensors.items()]
    return {own.get(first, first) + dot + rest: tensor for first, dot, rest, tensor in parts}


def count(tensors: dict[str, Tensor], name: str, dot: str = ".") -> int:
    """How many numbers follow a name."""
    found = (re.match(rf"{re.escape(name + dot)}(\d+)\.", other) for other in tensors)
    return len({match[1] for match in found if match})


def find_config(tensors: dict[str, Tensor], kind: str) -> ModelConfig:
    """The network that the shapes of its tensors tell, but for its scale. Raises whatever shapes
    and names lead to that are not a network's; `load_strictly` looks at all of them later."""
    width, channels = tensors["head.0.weight"].shape[:2]
    size = {"width": width, "channels": channels, "attention": "none", "keys": 0}
    size["blocks"] = blocks = count(tensors, "body") - 1
    match kind:
        case "edsr":
            size["residual_scale"] = 0.1 if (blocks, width) == (32, 256) else 1.0
        case "rcan" | "han":
            size["group_blocks"] = count(tensors, "body.0.body") - 1
            size["reduction"] = width // len(tensors["body.0.body.0.body.3.conv_du.0.weight"])
        case "a2n":
            size["reduction"] = width // len(tensors["body.0.ADM.0.weight"])
            kind = "a2n-m" if tensors["body.0.non_attention.weight"].shape[-1] == 1 else "a2n"
    return ModelConfig(backbone=kind, **size)


def find_scales(tensors: dict[str, Tensor], config: ModelConfig) -> tuple[int, ...]:
    """The enlargements that a tail may be for."""
    if config.backbone in ("a2n", "a2n-m"):
        return (4,) if "tail.1.1.weight" in tensors else (2, 3)
    names = [f"tail.0.{layer}.weight" for layer in (0, 2, 4)]
    grown = tuple(len(tensors[name]) / config.width for name in names if name in tensors)
    found = {(4,): 2, (9,): 3, (4, 4): 4}.get(grown)
    if found is None:
        raise ValueError("its tail enlarges neither ×2 nor ×3 nor ×4")
    return (found,)


def choose_scale(scales: tuple[int, ...], given: int | None, path: Path) -> int:
    """The scale that was given, if it can be; else the only one. Raises UsageError."""
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


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m acla.checkpoint")
    commands = parser.add_subparsers(required=True, metavar="import")
    told = f"make a model file of a published PyTorch file: {KNOWN}"
    command = commands.add_parser("import", help=told, description=told)
    command.add_argument("file", type=Path, metavar="FILE", help="a .pt, .pth or .safetensors file")
    command.add_argument("out", type=Path, metavar="OUT", help="the file to write, .safetensors")
    command.add_argument(
        "--task", choices=("sr",), default="sr", help="what it is for: all that are known enlarge"
    )
    command.add_argument(
        "--scale",
        type=int,
        choices=(2, 3, 4),
        help="enlargement per side; needed where shapes do not tell it, for A2N ×2 and ×3",
    )
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if os.path.realpath(args.file) == os.path.realpath(args.out):
        raise UsageError(f"{args.file} and {args.out} are the same; OUT needs a place of its own")
    if os.path.lexists(args.out) and not args.overwrite:
        raise UsageError(f"{args.out} is there already; --overwrite replaces it")
    network = import_network(args.file, args.scale)
    with open(args.file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = network.config
    task = Task(args.task, config.scale)
    save_model(args.out, network, config, task, {"imported": args.file.name, "sha256": digest})
    params = sum(parameter.numel() for parameter in network.parameters())
    say(
        f"{args.out}: {task}, {config.backbone} of {config.blocks} blocks × {config.width}, "
        f"{params:,} parameters"
    )


if __name__ == "__main__":
    run(main)
