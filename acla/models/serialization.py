"""Checkpoints: safetensors with the whole configuration inside, written atomically, read as
untrusted data.

A model file rebuilds its network alone; `python -m acla.checkpoint import` makes one of a published
PyTorch file. A state file holds what resuming needs besides: optimiser, averages, progress."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from acla.config import SAME_MODULE, ModelConfig, Task, from_dict
from acla.errors import NOT_VALID, CheckpointError, UsageError
from acla.files import write_atomically
from acla.models.backbones import Backbone
from acla.models.factory import build_network

FORMAT = "acla-1"
STATES = "state.safetensors of train.py or supernet.safetensors of search.py"
PROGRESS = {"step": int, "seconds": float, "plan": dict, "data": dict}
ANEW = "; begin anew with --out DIR"  # the end of what is said of a state
PUBLISHED = {".pt", ".pth", ".bin", ".ckpt"}  # suffixes of PyTorch files
IMPORTED = "; a published PyTorch file becomes one by python -m acla.checkpoint import FILE OUT"


@dataclass(frozen=True)
class Checkpoint:
    """A network that was read, ready for use (evaluation mode, on the CPU), its task, and the notes
    beside it."""

    model: Backbone
    config: ModelConfig
    task: Task
    info: dict[str, Any]


def save_model(path: Path, model: nn.Module, config: ModelConfig, task: Task, info: dict) -> None:
    """Write a network that `load_model` rebuilds from the file alone. info: JSON values, kept
    beside it."""
    header = {
        "kind": "model",
        "model": json.dumps(dataclasses.asdict(config)),
        "task": json.dumps(dataclasses.asdict(task)),
        "info": json.dumps(info),
    }
    write_tensors(path, model.state_dict(), header)


def load_model(path: Path) -> Checkpoint:
    """Read a network. Raises CheckpointError with the file and the reason: missing, broken, another
    kind, another shape."""
    tensors, header = read_tensors(path, "model")
    try:
        config = from_dict(ModelConfig, from_json(header["model"]))
        task = from_dict(Task, from_json(header["task"]))
        info = from_json(header["info"])
        require_types("the notes", info, {})
    except (*NOT_VALID, UsageError) as error:
        reason = in_one_line(error)
        raise CheckpointError(f"{path}: the configuration inside is not valid: {reason}") from error
    if task.scale != config.scale:
        raise CheckpointError(f"{path}: a network for ×{config.scale} with the task {task}")
    model = without_memory(config, tensors, path)
    load_strictly(model, tensors, path)
    return Checkpoint(model.eval(), config, task, info)


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Take over tensors whose names, shapes and types are the network's, all of them. Raises
    CheckpointError."""
    wanted = model.state_dict()
    require_fitting(wanted, tensors, path)
    if any(tensor.is_meta for tensor in wanted.values()):
        model.to_empty(device="cpu")
    model.load_state_dict(tensors)


def without_memory(config: ModelConfig, tensors: Mapping[str, Tensor], path: Path) -> Backbone:
    """The network on the device meta, to compare names and shapes with. Raises CheckpointError
    where it has more blocks than there are tensors, for even so a large one takes minutes."""
    blocks = config.blocks * (config.group_blocks if config.backbone in ("rcan", "han") else 1)
    if blocks > len(tensors):
        raise CheckpointError(
            f"{path}: does not fit its network: {len(tensors)} tensors for {blocks} blocks"
        )
    with torch.device("meta"):
        return build_network(config)


def require_fitting(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse tensors of other names, shapes or types than the wanted ones. Raises
    CheckpointError."""
    odd = sorted(wanted.keys() ^ tensors.keys())
    if odd:
        missing = sum(name in wanted for name in odd)
        raise CheckpointError(
            f"{path}: does not fit its network: {missing} tensors are missing and "
            f"{len(odd) - missing} are unknown, for instance {in_one_line(odd[0])}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"but the network's is {wanted[name].dtype} {list(wanted[name].shape)}"
            )


def fitting_weights(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], Task]:
    """What a network can begin with from the file of a trained one, and that one's task: the whole
    backbone, which must be the same, and every attention module that is the same as here, with the
    same layers to refer to. Raises CheckpointError."""
    given = load_model(path)
    begun, wanted = (backbone_alone(one) for one in (given.config, config))
    for name, value in dataclasses.asdict(wanted).items():
        if getattr(begun, name) != value:
            raise CheckpointError(
                f"{path}: another backbone than the one to begin, its {name} is "
                f"{getattr(begun, name)}, not {value}: give the flags of that network, or its file"
            )
    same = {f"attention.{p}" for p in config.positions if same_module(given.config, config, p)}
    tensors = {
        name: tensor
        for name, tensor in given.model.state_dict().items()
        if not name.startswith("attention.") or ".".join(name.split(".")[:2]) in same
    }
    return tensors, given.task


def backbone_alone(config: ModelConfig) -> ModelConfig:
    """A configuration without what says how its attention is."""
    plain = ModelConfig(attention="none", keys=0)
    fields = ("attention", "keys", "positions", "offset_radius", "mask_bias")
    return dataclasses.replace(config, **{name: getattr(plain, name) for name in fields})


def same_module(one: ModelConfig, other: ModelConfig, position: int) -> bool:
    """Whether the module behind a position is of one kind in two networks and refers to the same
    layers."""
    kinds = [(SAME_MODULE.get(c.attention, c.attention), c.keys) for c in (one, other)]
    referred = [[p for p in c.positions if p <= position] for c in (one, other)]
    return kinds[0] == kinds[1] and referred[0] == referred[1]


def save_state(path: Path, tensors: Mapping[str, Tensor], progress: dict[str, Any]) -> None:
    """Write what resuming needs: tensors by name and JSON values."""
    write_tensors(path, tensors, {"kind": "state", "progress": json.dumps(progress)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote in a run. Raises CheckpointError."""
    tensors, header = read_tensors(path, "state")
    try:
        progress = from_json(header["progress"])
        require_types("the progress", progress, PROGRESS)
    except NOT_VALID as error:
        raise CheckpointError(f"{path}: the progress inside is not valid: {error}{ANEW}") from error
    return tensors, progress


def from_json(text: str) -> Any:
    """What a header holds. Raises RecursionError, and ValueError, also for whole numbers of more
    than 64 bits, on which arithmetic fails."""

    def whole(digits: str) -> int:
        if not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    return json.loads(text, parse_int=whole)


def in_one_line(text: object) -> str:
    """A message that may hold names from a file, without their line breaks."""
    return " ".join(str(text).split())


def require_types(what: str, values: Any, kinds: Mapping[str, type]) -> None:
    """Refuse what is no JSON object or holds no value of its type under a name. Raises
    ValueError."""
    if type(values) is not dict:
        raise ValueError(f"{what} must be a JSON object, not {type(values).__name__}")
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"{what} has no {name}")
        if type(values[name]) is not kind:
            raise ValueError(f"{name} must be {kind.__name__}, not {type(values[name]).__name__}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file so that a reader sees the old one or the new one, never a part:
    temporary file, fsync, rename."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomically(Path(path), save(plain, metadata={"format": FORMAT, **header}))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file of ours and its header. Raises CheckpointError, which names the file that
    is wanted instead."""
    path = Path(path)
    wanted = {"model": "model.safetensors", "state": STATES}[kind]
    if path.is_dir():
        raise CheckpointError(f"{path}: that is a folder; the file wanted is {wanted} in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys()
            # Cloned, for arithmetic on memory of another alignment may round differently.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        hint = IMPORTED if path.suffix in PUBLISHED else ""
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}){hint}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: a safetensors file, but not one of ours ({FORMAT}); the file wanted is "
            f"{wanted} of a run"
        )
    if header.get("kind") != kind:
        raise CheckpointError(
            f"{path}: holds a {header.get('kind')}, not a {kind}; the file wanted is {wanted}"
        )
    return tensors, header
