"""The file format of networks and runs: safetensors with the configuration in the header.

The header holds `format` (FORMAT) and `kind`. A model file (`model`) rebuilds its network alone:
besides the tensors, under the network's own names, its header holds three JSON texts, `model` (a
ModelConfig), `task` (a Task) and `info` (notes); its tensors may be of half the size, and are read
as float32. A state file (`state`) is what resuming a run needs: tensors of network, optimiser and
averages, and the JSON text `progress`. `python -m acla.checkpoint` converts published PyTorch files
and makes files of half the size."""

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

from acla.config import ATTENTIONS, ModelConfig, Task, from_dict
from acla.errors import NOT_VALID, CheckpointError, UsageError, one_line
from acla.files import write_atomically
from acla.models.backbones import Backbone
from acla.models.factory import build_network

FORMAT = "acla-1"
FILES = {
    "model": "model.safetensors",
    "state": "state.safetensors of train.py or supernet.safetensors of search.py",
}
HALVES = (torch.float16, torch.bfloat16)
PROGRESS = {"step": int, "seconds": float, "plan": dict, "data": dict}
START_OVER = "; start over with --out DIR"  # how messages about a state end
PYTORCH = {".pt", ".pth", ".bin", ".ckpt"}  # suffixes of PyTorch files
# Fields that configure the inserted attention and not the backbone
OF_ATTENTION = ("attention", "keys", "positions", "offset_radius", "mask_bias")


@dataclass(frozen=True)
class Checkpoint:
    """A model file: the network, evaluating on the CPU, its configuration, task and notes."""

    model: Backbone
    config: ModelConfig
    task: Task
    info: dict[str, Any]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the network as a folder in the Hub's form: model.safetensors, a model file, and
        config.json, which repeats its header for other readers. Replaces these two files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder / FILES["model"], self.model, self.config, self.task, self.info)
        parts = {"model": self.config, "task": self.task}
        header = {name: dataclasses.asdict(part) for name, part in parts.items()}
        header = {"model_type": "acla", **header, "info": self.info}
        write_atomically(folder / "config.json", (json.dumps(header, indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Checkpoint":
        """The network of a folder in the Hub's form. Raises CheckpointError."""
        if not Path(folder).is_dir():
            raise CheckpointError(
                f"{folder}: there is no such folder; for a network on the Hub give the one that "
                "huggingface_hub.snapshot_download returns"
            )
        return load_model(Path(folder) / FILES["model"])


def save_model(path: Path, model: nn.Module, config: ModelConfig, task: Task, info: dict) -> None:
    """Write a model file, all that `load_model` needs. info: notes, JSON values."""
    header = {
        "kind": "model",
        "model": json.dumps(dataclasses.asdict(config)),
        "task": json.dumps(dataclasses.asdict(task)),
        "info": json.dumps(info),
    }
    write_tensors(path, model.state_dict(), header)


def load_model(path: Path) -> Checkpoint:
    """Read a model file. Raises CheckpointError with the file and the reason: missing, damaged, of
    another kind, or with tensors that do not fit its configuration."""
    tensors, header = read_tensors(path, "model")
    config, task, info = parse_header(path, header)
    groups = config.group_blocks if config.backbone in ("rcan", "han") else 1
    if config.blocks * groups > len(tensors):  # building it would take minutes, even on meta
        raise CheckpointError(
            f"{path}: does not fit its network: {len(tensors)} tensors for "
            f"{config.blocks * groups} blocks"
        )
    with torch.device("meta"):  # allocates nothing before names and shapes are compared
        model = build_network(config)
    load_strictly(model, widened(tensors), path)
    return Checkpoint(model.eval(), config, task, info)


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, float32 where they are of half the size."""
    return {name: t.float() if t.dtype in HALVES else t for name, t in tensors.items()}


def read_header(path: Path) -> tuple[ModelConfig, Task, dict[str, Any]]:
    """Configuration, task and notes of a model file alone. Raises CheckpointError."""
    return parse_header(path, read_tensors(path, "model", wanted=False)[1])


def parse_header(path: Path, header: Mapping[str, str]) -> tuple[ModelConfig, Task, dict[str, Any]]:
    """Configuration, task and notes in a model file's header. Raises CheckpointError."""
    try:
        config = from_dict(ModelConfig, from_json(header["model"]))
        task = from_dict(Task, from_json(header["task"]))
        info = from_json(header["info"])
        require_types("the notes", info, {})
    except (*NOT_VALID, UsageError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{path}: the configuration inside is not valid: {reason}") from error
    if task.scale != config.scale:
        raise CheckpointError(f"{path}: a network for ×{config.scale} with the task {task}")
    return config, task, info


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Set a network's tensors, which may be on the meta device, to those of a file. Raises
    CheckpointError unless names, shapes and types are equal; nothing is allocated before."""
    expected = model.state_dict()
    if odd := sorted(expected.keys() ^ tensors.keys()):
        missing = sum(name in expected for name in odd)
        raise CheckpointError(
            f"{path}: does not fit its network: {missing} tensors are missing and "
            f"{len(odd) - missing} are unknown, for instance {one_line(odd[0])}"
        )
    for name, own in expected.items():
        tensor = tensors[name]
        if tensor.shape != own.shape or tensor.dtype != own.dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"but the network's is {own.dtype} {list(own.shape)}"
            )
    if any(tensor.is_meta for tensor in expected.values()):
        model.to_empty(device="cpu")
    model.load_state_dict(tensors)


def compatible_weights(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], Task]:
    """The weights of a model file with which a network can be initialised, and the file's task: the
    whole backbone, which must be equal, and the attention modules of the same kind and size at the
    same position that refer to the same layers. A network in colour can begin a gray one. Raises
    CheckpointError."""
    source = load_model(path)
    to_gray = (source.config.channels, config.channels) == (3, 1)
    wanted = dataclasses.replace(config, channels=3) if to_gray else config
    for name, value in dataclasses.asdict(wanted).items():
        if name not in OF_ATTENTION and getattr(source.config, name) != value:
            raise CheckpointError(
                f"{path}: another backbone than the one to begin, its {name} is "
                f"{getattr(source.config, name)}, not {value}: give the flags of that network, or "
                "its file"
            )
    same = {f"attention.{p}" for p in config.positions if same_module(source.config, config, p)}
    tensors = {
        name: tensor
        for name, tensor in source.model.state_dict().items()
        if not name.startswith("attention.") or ".".join(name.split(".")[:2]) in same
    }
    return folded(tensors, config) if to_gray else tensors, source.task


def folded(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a network in colour for a gray one: it restores a gray picture as the network
    in colour restores its three equal channels, and returns their mean; but for one mean colour,
    which is subtracted from all channels."""
    with torch.device("meta"):
        wanted = build_network(config).state_dict()
    gray = {}
    for name, tensor in tensors.items():
        if "_mean." in name:  # fixed, of one channel already
            continue
        if tensor.shape[0] != wanted[name].shape[0]:
            tensor = tensor.mean(0, keepdim=True)
        if tensor.shape[1:] != wanted[name].shape[1:]:
            tensor = tensor.sum(1, keepdim=True)
        gray[name] = tensor
    return gray


def same_module(one: ModelConfig, other: ModelConfig, position: int) -> bool:
    """Whether two networks have equal modules at a position, which refer to the same layers."""
    kinds = [(ATTENTIONS[c.attention].module, c.keys) for c in (one, other)]
    referred = [[p for p in c.positions if p <= position] for c in (one, other)]
    return kinds[0] == kinds[1] and referred[0] == referred[1]


def save_state(path: Path, tensors: Mapping[str, Tensor], progress: dict[str, Any]) -> None:
    """Write a state file: tensors by name, and progress, JSON values with those of PROGRESS."""
    write_tensors(path, tensors, {"kind": "state", "progress": json.dumps(progress)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state file: tensors and progress. Raises CheckpointError."""
    tensors, header = read_tensors(path, "state")
    try:
        progress = from_json(header["progress"])
        require_types("the progress", progress, PROGRESS)
    except NOT_VALID as error:
        raise CheckpointError(
            f"{path}: the progress inside is not valid: {error}{START_OVER}"
        ) from error
    return tensors, progress


def from_json(text: str) -> Any:
    """A header's JSON text as values. Raises ValueError, also for integers of more than 64 bits,
    with which floating-point arithmetic may fail, and RecursionError."""

    def integer(digits: str) -> int:
        if not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    return json.loads(text, parse_int=integer)


def require_types(name: str, values: Any, kinds: Mapping[str, type]) -> None:
    """Refuse all but a JSON object with values of these types. Raises ValueError."""
    if type(values) is not dict:
        raise ValueError(f"{name} must be a JSON object, not {type(values).__name__}")
    for key, kind in kinds.items():
        if key not in values:
            raise ValueError(f"{name} has no {key}")
        if type(values[key]) is not kind:
            raise ValueError(f"{key} must be {kind.__name__}, not {type(values[key]).__name__}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file of FORMAT; on any failure an older file stays whole."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomically(Path(path), save(plain, metadata={"format": FORMAT, **header}))


def read_tensors(
    path: Path, kind: str, wanted: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, if wanted, and the header of a safetensors file of FORMAT and of this kind.
    Raises CheckpointError, which names the right file."""
    path, expected = Path(path), FILES[kind]
    if path.is_dir():
        raise CheckpointError(f"{path}: that is a folder; the file wanted is {expected} in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Cloned: arithmetic on memory of another alignment may round differently.
            names = file.keys() if wanted else ()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        hint = ""
        if path.suffix in PYTORCH:
            hint = "; python -m acla.checkpoint import FILE OUT converts a published PyTorch file"
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}){hint}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: a safetensors file, but not one of ours ({FORMAT}); the file wanted is "
            f"{expected} of a run"
        )
    if header.get("kind") != kind:
        raise CheckpointError(
            f"{path}: holds a {header.get('kind')}, not a {kind}; the file wanted is {expected}"
        )
    return tensors, header
