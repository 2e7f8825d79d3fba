"""Configurations: frozen dataclasses and the paper's presets. Standard library only."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, get_origin

from acla.errors import UsageError

SETTING_FLAG = {"sr": "scale", "denoise": "sigma", "car": "q"}
SETTING_DEFAULT = {"sr": 2, "denoise": 30, "car": 10, "demosaic": 0}
TASKS = tuple(SETTING_DEFAULT)
BACKBONES = ("edsr", "rcan", "han", "a2n", "a2n-m")
# Names in older files → fields
RENAMED = {
    "ring": "offset_radius",
    "open_logit": "mask_bias",
    "rate": "lr",
    "halve": "lr_half_every",
    "batch": "batch_size",
    "patch": "patch_size",
    "validate": "val_every",
    "offset_rate": "offset_lr_mult",
    "alpha_rate": "alpha_lr",
}
# Older files mean the defaults
LATER = ("until", "offset_radius", "mask_bias", "offset_lr_mult", "mask_temperature", "mask_noise")
LATER += ("cuda_graph", "method", "cost", "draws", "gate_noise_end")
AMP_FORMATS = ("bf16", "fp16")
MASK_NOISE = "draw the key masks with noise (Eq. 7); without it is not the paper's"

# λ and insert positions by task and backbone, of the depths in `model_preset`
TABLE_9 = {
    ("sr", "edsr"): (0.15, (3, 12, 26, 31, 32)),
    ("sr", "rcan"): (0.3, (1, 3, 5, 9)),
    ("denoise", "edsr"): (0.2, (2, 7, 9, 13, 15)),
    ("demosaic", "edsr"): (0.2, (2, 5, 11, 14, 16)),
    ("car", "edsr"): (0.2, (2, 7, 10, 13, 14)),
}
PAPER_POSITIONS = {network: positions for network, (_, positions) in TABLE_9.items()}


@dataclass(frozen=True)
class AttentionKind:
    """The traits of an attention. module: the kind that it shares its modules with; keys: default
    number of sampled keys per layer, 0 without sampling; masked: whether a mask chooses among them;
    at_searched: whether the paper inserts it at searched positions, not at evenly spread ones;
    searchable: whether a supernet may have it."""

    module: str
    keys: int = 0
    masked: bool = False
    at_searched: bool = False
    searchable: bool = False


ATTENTIONS = {
    "none": AttentionKind("none"),
    "cla": AttentionKind("cla", keys=8, searchable=True),
    "acla": AttentionKind("acla", keys=16, masked=True, at_searched=True, searchable=True),
    "cla-i": AttentionKind("cla", keys=8, at_searched=True),  # Table 6, as cla-k
    "cla-k": AttentionKind("acla", keys=16, masked=True),
    "acla+se": AttentionKind("acla+se", keys=16, masked=True, at_searched=True),
    "nl": AttentionKind("nl"),
    "clnl": AttentionKind("clnl"),
    "se": AttentionKind("se"),
    "mha": AttentionKind("mha"),
}
# Fields of modules that sample keys, and of those with masks
OF_KEYS = ("keys", "offset_radius", "offset_lr_mult")
OF_MASKS = ("mask_bias", "mask_temperature", "mask_noise")


Limits = tuple[str, Callable[[float], bool]]  # in words, and the check
POSITIVE: Limits = ("above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Limits = ("0 or more", lambda value: 0 <= value < math.inf)
SEED: Limits = ("0 or more and below 2^62", lambda value: 0 <= value < 2**62)


def between(least: int, most: int) -> Limits:
    return f"{least} to {most}", lambda value: least <= value <= most


def option(
    default: Any,
    help: str | None,
    limits: Limits | None = None,
    choices: Iterable | None = None,
    shown: str = "by --preset",
) -> Any:
    """A dataclass field with all that checks its values and makes it a command-line flag. help: its
    text, with the unit, None for no flag; shown: the default in --help."""
    choices = tuple(choices) if choices else None
    metadata = {"help": help, "limits": limits, "choices": choices, "shown": shown}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Task:
    """A restoration task. setting: the scale (sr: 2, 3, 4), the noise level in 8-bit levels
    (denoise: > 0), the JPEG quality (car: 1..100) or 0 (demosaic); until: 0, or the end of a range
    of noise levels or qualities from `setting` on (denoise: >= 0), drawn per picture."""

    name: str = "car"
    setting: float = 10
    until: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "sr": ("2, 3 or 4", self.setting in (2, 3, 4)),
            "denoise": ("above 0", 0 < self.setting + self.until < math.inf and self.setting >= 0),
            "car": ("a whole number of 1 to 100", self.setting in range(1, 101)),
            "demosaic": ("0", self.setting == 0),
        }
        if self.name not in allowed:
            raise UsageError(f"unknown task {self.name!r}; known: {', '.join(TASKS)}")
        values, fits = allowed[self.name]
        if not fits and self.name == "demosaic":
            raise UsageError(f"task demosaic takes no setting, not {self.setting:g}")
        if not fits:
            flag = SETTING_FLAG[self.name]
            raise UsageError(f"--{flag} must be {values}, not {self.setting:g}")
        if type(self.until) is not int or (self.until and self.name not in ("car", "denoise")):
            raise UsageError(f"a range ends in a whole number and is no setting of {self.name}")
        most = 100 if self.name == "car" else math.inf
        if self.until and not self.setting < self.until <= most:
            given = f"--{SETTING_FLAG[self.name]} {self.setting:g}-{self.until}"
            raise UsageError(f"a range rises, and qualities end at 100: --q 5-60, not {given}")

    @property
    def scale(self) -> int:
        """Enlargement of the restored picture, per side."""
        return int(self.setting) if self.name == "sr" else 1

    @property
    def channels(self) -> int:
        """Channels of the network's pictures: 1 (Y) for JPEG artifacts, else 3 (RGB)."""
        return 1 if self.name == "car" else 3

    @property
    def value(self) -> str:
        """The setting as its flag takes it: 10, 5-60, or nothing."""
        if self.name not in SETTING_FLAG:
            return ""
        return f"{self.setting:g}" + (f"-{self.until}" if self.until else "")

    @property
    def label(self) -> str:
        """The setting as tables name it: x2, sigma30, q10, or nothing."""
        return {"sr": "x", "denoise": "sigma", "car": "q", "demosaic": ""}[self.name] + self.value

    def covers(self, other: "Task") -> bool:
        """Whether the other task is the same, or its settings lie within this range."""
        inside = self.setting <= other.setting <= (other.until or other.setting) <= self.until
        return self == other or (self.name == other.name and inside)

    def __str__(self) -> str:
        return f"{self.name} {self.label}".strip()


@dataclass(frozen=True)
class ModelConfig:
    """Network: all that a checkpoint needs to rebuild it."""

    backbone: str = option(
        "edsr", "the network that attention is inserted into", choices=BACKBONES, shown="edsr"
    )
    blocks: int = option(16, "EDSR, A2N: blocks; RCAN, HAN: residual groups", between(1, 256))
    width: int = option(128, "feature channels", between(1, 4096))
    group_blocks: int = option(20, "RCAN, HAN: residual blocks in a group", between(1, 256))
    reduction: int = option(
        16,
        "squeeze factor of RCAN's, HAN's channel attention and A2N's weights",
        between(1, 4096),
        shown="by --backbone",
    )
    residual_scale: float = option(1.0, "EDSR: factor on each residual branch")
    attention: str = option(
        "acla",
        "the attention module; Tables 4, 6 and 11 compare them",
        choices=ATTENTIONS,
        shown="as --arch says, else acla",
    )
    keys: int = option(
        16, "sampled keys per layer and query (K)", between(0, 1024), shown="by --attention"
    )
    offset_radius: float = option(
        2.0,
        "pixels between the rings on which keys start",
        ("above 0 and at most 1024", lambda value: 0 < value <= 1024),
        shown="2",
    )
    mask_bias: float = option(
        2.0,
        "initial bias of the mask logits; above 0: keys start open",
        between(-100, 100),
        shown="2",
    )
    positions: tuple[int, ...] = option(
        (), "insert positions, counted from 1: 2,7,10", shown="as --arch says"
    )
    channels: int = option(
        3, "picture channels: 1 gray, 3 colour (car: RGB)", choices=(1, 3), shown="by --task"
    )
    scale: int = option(1, None, choices=(1, 2, 3, 4))  # enlargement per side; the task says it

    def __post_init__(self) -> None:
        check_fields(self)
        shown = format_positions(self.positions)
        if list(self.positions) != sorted(set(self.positions)):
            raise UsageError(f"positions must rise and not repeat: {shown}")
        if self.positions and not 1 <= self.positions[0] <= self.positions[-1] <= self.blocks:
            raise UsageError(
                f"positions {shown} do not fit {self.blocks} blocks: they count from 1 to "
                f"{self.blocks} (see --blocks)"
            )
        if not self.keys and self.kind.keys:
            raise UsageError("--keys must be 1 to 1024, not 0")
        if self.keys and not self.kind.keys and self.attention != "none":
            raise UsageError(
                f"--attention {self.attention} samples no keys: leave out --keys {self.keys}"
            )
        if self.attention == "none" and self.positions:
            raise UsageError("--attention none takes no --positions")

    @property
    def kind(self) -> AttentionKind:
        """The traits of its attention."""
        return ATTENTIONS[self.attention]

    @property
    def plain(self) -> "ModelConfig":
        """The same backbone without attention."""
        return dataclasses.replace(self, attention="none", keys=0, positions=())


@dataclass(frozen=True)
class TrainConfig:
    """Training a network (Section 4.1)."""

    steps: int = option(1_000_000, "optimiser steps", POSITIVE)
    epoch_steps: int = option(1000, "steps of an epoch", POSITIVE)
    batch_size: int = option(16, "patches in a step, over all processes", POSITIVE)
    patch_size: int = option(48, "side of a low-quality patch, in pixels", POSITIVE)
    lr: float = option(1e-4, "initial learning rate", POSITIVE)
    lr_half_every: int = option(200_000, "steps between halvings of the learning rate", POSITIVE)
    loss: str = option(
        "l1", "training loss; psnr: its negative, in dB", choices=("l1", "mse", "psnr")
    )
    val_every: int = option(5000, "steps between validations and checkpoints", POSITIVE)
    train_set: str = option(
        "sample", "set of pictures to train on; sample is built in", shown="sample"
    )
    val_set: str = option(
        "",
        "sets to validate on, A,B",
        shown="every tenth picture of the training set; sample has its own",
    )
    amp: bool = option(False, "automatic mixed precision", shown="off")
    amp_dtype: str = option(
        "bf16",
        "type of --amp; fp16 is for GPUs, with scaled gradients",
        choices=AMP_FORMATS,
        shown="bf16",
    )
    clip: float = option(0.0, "clip the gradient to this norm; 0: off", NOT_NEGATIVE, shown="off")
    compile: bool = option(
        False, "run the network through torch.compile; weights differ in bits", shown="off"
    )
    cuda_graph: bool = option(
        False, "on a GPU, replay the training step as one CUDA graph", shown="off"
    )
    ema: bool = option(
        False, "validate and save an exponential average of the weights (decay 0.999)", shown="off"
    )
    offset_lr_mult: float = option(
        1.0, "factor on the learning rate of the attention's offsets and weights", POSITIVE
    )
    mask_temperature: float = option(
        1.0, "temperature of the key masks' gradient; lower: steeper", POSITIVE, shown="1"
    )
    mask_noise: bool = option(True, MASK_NOISE, shown="on")
    seed: int = option(0, "seed of weights, patches and noise", SEED, shown="0")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.amp_dtype != "bf16" and not self.amp:
            raise UsageError(f"--amp-dtype {self.amp_dtype} goes with --amp")


@dataclass(frozen=True)
class SearchConfig:
    """Searching insert positions (Section 3.2, Table 9)."""

    method: str = option(
        "paper", "front: a Pareto front (ours)", choices=("paper", "front"), shown="paper"
    )
    cost: str = option("macs", "a front's; ms: measured", choices=("macs", "ms"), shown="macs")
    steps: int = option(200_000, "optimiser steps of both stages together", POSITIVE)
    epoch_steps: int = option(1000, "steps of an epoch, one row of search.jsonl", POSITIVE)
    batch_size: int = option(16, "patches in a step", POSITIVE)
    patch_size: int = option(48, "side of a low-quality patch, in pixels", POSITIVE)
    lr: float = option(1e-4, "initial learning rate of the weights, then cosine", POSITIVE)
    alpha_lr: float = option(
        1e-4, "learning rate of α at the start of the second stage, then cosine", POSITIVE
    )
    warmup: float = option(
        0.5,
        "share of the steps that train weights alone (first stage), 0..1",
        ("0 or more and below 1", lambda value: 0 <= value < 1),
    )
    lam: float = option(
        0.2,
        "λ of Eq. 14, the weight of log cost",
        NOT_NEGATIVE,
        shown="by --preset; paper: Table 9's",
    )
    tau: float = option(1.0, "gate temperature until the second stage", POSITIVE, shown="1")
    tau_end: float = option(0.1, "gate temperature at the end", POSITIVE, shown="0.1")
    gate_noise_end: float = option(
        1.0,
        "share of the gates' noise that is left at the end; below 1, not the paper's, they end "
        "decided; a front has no such noise",
        ("above 0 and at most 1", lambda value: 0 < value <= 1),
        shown="1",
    )
    draws: int = option(1, "draws of the gates in a step on α (paper: 1)", POSITIVE, shown="1")
    mask_noise: bool = option(True, MASK_NOISE, shown="on")
    train_set: str = option(
        "sample", "set of pictures to search on; sample is built in", shown="sample"
    )
    seed: int = option(0, "seed of weights, patches, noise and gates", SEED, shown="0")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def first_stage(self) -> int:
        """Steps that train the weights alone: all of a front, fewer than all of the paper's."""
        return self.steps if self.method == "front" else int(self.steps * self.warmup)


# Presets

# In the few steps of small and tiny, offsets and weights at the common rate hardly leave their
# initial values; at ten times that rate attention gains (docs/results.md). The paper has one rate.
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"steps": 20_000, "epoch_steps": 100, "val_every": 1000, "lr": 4e-4}
    | {"lr_half_every": 5000, "offset_lr_mult": 10.0},
    "tiny": {"steps": 300, "epoch_steps": 20, "val_every": 100, "lr": 2e-3, "lr_half_every": 100}
    | {"offset_lr_mult": 10.0, "batch_size": 8, "patch_size": 32},
}
SEARCH_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"steps": 10_000, "epoch_steps": 100, "lr": 4e-4, "alpha_lr": 5e-3},
    "tiny": {"steps": 480, "epoch_steps": 40, "lr": 1e-3, "alpha_lr": 0.15, "warmup": 0.6}
    | {"batch_size": 4, "patch_size": 24},
}
PRESETS = tuple(TRAIN_PRESETS)


def model_preset(preset: str, task: Task, backbone: str = "edsr") -> ModelConfig:
    """The network of a preset, without attention positions. The depth is the paper's in every
    preset, so that Table 9's positions fit; small and tiny are narrower."""
    deep = task.name == "sr"
    width = {"paper": 256 if deep else 128, "small": 64, "tiny": 16}[preset]
    if backbone in ("rcan", "han"):
        group_blocks = {"paper": 20, "small": 4, "tiny": 2}[preset]
        size = {"blocks": 10, "group_blocks": group_blocks, "width": min(width, 64)}
    elif backbone in ("a2n", "a2n-m"):
        size = {"blocks": 16, "reduction": 4, "width": min(width, 40)}
    else:
        residual_scale = 0.1 if width == 256 else 1.0
        size = {"blocks": 32 if deep else 16, "residual_scale": residual_scale, "width": width}
    return ModelConfig(backbone=backbone, channels=task.channels, scale=task.scale, **size)


def train_preset(preset: str) -> TrainConfig:
    """The length of a training run, and its learning rates."""
    return TrainConfig(**TRAIN_PRESETS[preset])


def search_preset(preset: str, task: Task, backbone: str = "edsr") -> SearchConfig:
    """The length of a search and its λ: Table 9's, or 0.2 where it has none. In the minutes of a
    tiny search a module shows little of its gain, so that λ is a tenth there."""
    lam, _ = TABLE_9.get((task.name, backbone), (0.2, ()))
    lam /= 10 if preset == "tiny" else 1
    return SearchConfig(**SEARCH_PRESETS[preset], lam=lam)


# Checks, JSON


def flag_of(name: str) -> str:
    """A field's flag: --lr; `lambda` is no name for a field."""
    return "--" + {"lam": "lambda"}.get(name, name.replace("_", "-"))


def format_positions(positions: Iterable[int]) -> str:
    """(2, 7, 10) → '2, 7, 10'; nothing → 'none'."""
    return ", ".join(map(str, positions)) or "none"


def check_fields(config: Any) -> None:
    """Refuse values of another type, or outside a field's choices or limits, as files have."""
    for item in dataclasses.fields(config):
        value, kind = getattr(config, item.name), get_origin(item.type) or item.type
        flag, limits = flag_of(item.name), item.metadata["limits"]
        number = kind is float and type(value) is int
        if not (type(value) is kind or number) or (
            kind is tuple and not all(type(part) is int for part in value)
        ):
            raise UsageError(f"{item.name} must be {item.type}, not {value!r}")
        if kind is float and not math.isfinite(value):
            raise UsageError(f"{flag} must be finite, not {value:g}")
        if limits and not limits[1](value):
            raise UsageError(f"{flag} must be {limits[0]}, not {value:g}")
        choices = item.metadata["choices"]
        if choices and value not in choices:
            known = ", ".join(map(str, choices))
            raise UsageError(f"unknown {item.name} {value!r}; known: {known}")


def from_dict(kind: type, values: Any) -> Any:
    """A configuration from JSON's dictionary; every field must be there, except those that older
    files lack, and no other. Raises UsageError."""
    if not isinstance(values, dict):
        raise UsageError(f"{kind.__name__} must be a JSON object, not {type(values).__name__}")
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    names = {item.name for item in dataclasses.fields(kind)}
    odd = sorted((values.keys() ^ names) - (names & set(LATER)))
    if odd:
        raise UsageError(f"{kind.__name__} has missing or unknown fields: {', '.join(odd)}")
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**as_tuples)
