"""Configurations: frozen dataclasses and the paper's presets. Standard library only."""

import dataclasses
import json
import math
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
LATER = ("until", "offset_radius", "mask_bias", "offset_lr_mult", "mask_temperature")
PRESETS = ("paper", "small", "tiny")
AMP_FORMATS = ("bf16", "fp16")

# Table 9. The depth says for which network the positions were found.
PAPER_POSITIONS = {
    ("sr", "edsr"): (3, 12, 26, 31, 32),
    ("sr", "rcan"): (1, 3, 5, 9),
    ("denoise", "edsr"): (2, 7, 9, 13, 15),
    ("demosaic", "edsr"): (2, 5, 11, 14, 16),
    ("car", "edsr"): (2, 7, 10, 13, 14),
}
PAPER_LAMBDA = {
    ("sr", "edsr"): 0.15,
    ("sr", "rcan"): 0.3,
    ("denoise", "edsr"): 0.2,
    ("demosaic", "edsr"): 0.2,
    ("car", "edsr"): 0.2,
}


@dataclass(frozen=True)
class AttentionKind:
    """The traits of an attention. module: the kind whose modules it has, at other positions; keys:
    sampled keys per layer by default, 0: it samples none; masked: whether it chooses among them by
    a mask; at_searched: whether the paper inserts it at searched positions, else evenly spread ones;
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
DEFAULT_KEYS = {name: kind.keys for name, kind in ATTENTIONS.items() if kind.keys}
MASKED = tuple(name for name, kind in ATTENTIONS.items() if kind.masked)


def option(
    default: Any, help: str | None, choices: tuple | None = None, shown: str = "by --preset"
) -> Any:
    """A dataclass field: its default, its known values, and the help with the unit that makes it a
    command-line flag. `shown` is what --help says of the default."""
    return field(default=default, metadata={"help": help, "choices": choices, "shown": shown})


@dataclass(frozen=True)
class Task:
    """What is restored. `setting` is the scale (sr: 2, 3, 4), the noise level in 8-bit levels
    (denoise: > 0), the JPEG quality (car: 1..100) or 0 (demosaic). `until` is 0, or the quality
    where a range that begins at `setting` ends: every picture's is drawn from it."""

    name: str = "car"
    setting: float = 10
    until: int = 0

    def __post_init__(self) -> None:
        known = {
            "sr": self.setting in (2, 3, 4),
            "denoise": 0 < self.setting < float("inf"),
            "car": self.setting in range(1, 101),
            "demosaic": self.setting == 0,
        }
        ranges = {"sr": "2, 3 or 4", "denoise": "above 0", "car": "a whole number of 1 to 100"}
        if self.name not in known:
            raise UsageError(f"unknown task {self.name!r}; known: {', '.join(TASKS)}")
        if not known[self.name]:
            if self.name == "demosaic":
                raise UsageError(f"task demosaic takes no setting, not {self.setting:g}")
            flag = SETTING_FLAG[self.name]
            raise UsageError(f"--{flag} must be {ranges[self.name]}, not {self.setting:g}")
        if type(self.until) is not int or (self.until and self.name != "car"):
            raise UsageError(f"a range is for whole qualities of car, not for {self.name}")
        if self.until and not self.setting < self.until <= 100:
            raise UsageError(
                f"a range of qualities rises, up to 100: --q 5-60, not "
                f"{self.setting:g}-{self.until}"
            )

    @property
    def scale(self) -> int:
        """How many times larger the restored picture is, per side."""
        return int(self.setting) if self.name == "sr" else 1

    @property
    def channels(self) -> int:
        """Channels of the network's pictures: 1 (Y) for JPEG artifacts, else 3 (RGB)."""
        return 1 if self.name == "car" else 3

    @property
    def label(self) -> str:
        """The setting as tables name it: x2, sigma30, q10, or nothing."""
        prefix = {"sr": "x", "denoise": "sigma", "car": "q", "demosaic": ""}[self.name]
        until = f"-{self.until}" if self.until else ""
        return f"{prefix}{self.setting:g}{until}" if prefix else ""

    def covers(self, other: "Task") -> bool:
        """Whether the other task is this one, or has one of this one's qualities."""
        inside = self.setting <= other.setting <= (other.until or other.setting) <= self.until
        return self == other or (self.name == other.name and inside)

    def __str__(self) -> str:
        return f"{self.name} {self.label}".strip()


@dataclass(frozen=True)
class ModelConfig:
    """A network, whole: what a checkpoint needs to rebuild it."""

    backbone: str = option(
        "edsr", "the network that the attention is inserted into", BACKBONES, "edsr"
    )
    blocks: int = option(16, "EDSR, A2N: blocks; RCAN, HAN: residual groups")
    width: int = option(128, "feature channels")
    group_blocks: int = option(20, "RCAN, HAN: residual blocks in a group")
    reduction: int = option(
        16,
        "squeeze factor of RCAN's and HAN's channel attention, and of A2N's branch weights",
        shown="by --backbone",
    )
    residual_scale: float = option(1.0, "EDSR: factor on each residual branch")
    attention: str = option(
        "acla",
        "the attention module; Tables 4, 6 and 11 compare them",
        tuple(ATTENTIONS),
        "as --arch says, else acla",
    )
    keys: int = option(16, "sampled keys per layer and query (K)", shown="by --attention")
    offset_radius: float = option(2.0, "pixels between the rings on which keys start", shown="2")
    mask_bias: float = option(
        2.0, "bias that mask logits start with; above 0: keys start open", shown="2"
    )
    positions: tuple[int, ...] = option(
        (), "insert positions, counted from 1: 2,7,10", shown="as --arch says"
    )
    channels: int = option(3, "picture channels: 1 gray, 3 colour", (1, 3), "by --task")
    scale: int = option(1, None, (1, 2, 3, 4))  # enlargement per side; the task says it

    def __post_init__(self) -> None:
        check_fields(self)
        largest = {
            "blocks": 256,
            "width": 4096,
            "group_blocks": 256,
            "reduction": 4096,
            "keys": 1024,
        }
        for name, most in largest.items():
            least = 0 if name == "keys" and self.attention not in DEFAULT_KEYS else 1
            if not least <= getattr(self, name) <= most:
                flag, value = flag_name(name), getattr(self, name)
                raise UsageError(f"--{flag} must be {least} to {most}, not {value}")
        if not 0 < self.offset_radius <= 1024:
            raise UsageError(
                f"--offset-radius must be above 0 and at most 1024, not {self.offset_radius:g}"
            )
        if not abs(self.mask_bias) <= 100:
            raise UsageError(f"--mask-bias must be -100 to 100, not {self.mask_bias:g}")
        if list(self.positions) != sorted(set(self.positions)):
            raise UsageError(
                f"positions must rise and not repeat: {format_positions(self.positions)}"
            )
        if self.positions and not 1 <= self.positions[0] <= self.positions[-1] <= self.blocks:
            raise UsageError(
                f"positions {format_positions(self.positions)} do not fit {self.blocks} blocks: "
                f"they count from 1 to {self.blocks} (see --blocks)"
            )
        if self.keys and self.attention not in ("none", *DEFAULT_KEYS):
            raise UsageError(
                f"--attention {self.attention} samples no keys: leave out --keys {self.keys}"
            )
        if self.attention == "none" and self.positions:
            raise UsageError("--attention none takes no --positions")


@dataclass(frozen=True)
class TrainConfig:
    """Training a network (Section 4.1)."""

    steps: int = option(1_000_000, "optimiser steps")
    epoch_steps: int = option(1000, "steps that count as one epoch")
    batch_size: int = option(16, "patches in a step, over all processes")
    patch_size: int = option(48, "side of a low-quality patch, in pixels")
    lr: float = option(1e-4, "learning rate at the start")
    lr_half_every: int = option(
        200_000, "steps after which the learning rate is halved, again and again"
    )
    loss: str = option("l1", "training loss; psnr: its negative, in dB", ("l1", "mse", "psnr"))
    val_every: int = option(5000, "steps between validations and checkpoints")
    train_set: str = option(
        "sample", "set of pictures to train on; sample is built in", shown="sample"
    )
    val_set: str = option(
        "",
        "set to validate on, or several, A,B; without any a tenth of the training set (sample has "
        "its own)",
        shown="none",
    )
    amp: bool = option(False, "compute in a short number format where it is safe", shown="off")
    amp_dtype: str = option(
        "bf16", "that format; fp16 is for GPUs, with scaled gradients", AMP_FORMATS, "bf16"
    )
    clip: float = option(
        0.0, "largest norm of a step's gradient, longer ones are shortened; 0: off", shown="off"
    )
    compile: bool = option(
        False, "run the network through torch.compile; the weights' bits may differ", shown="off"
    )
    ema: bool = option(
        False, "average the weights over steps (decay 0.999), use the averages", shown="off"
    )
    offset_lr_mult: float = option(
        1.0, "factor on the learning rate of the attention's offsets and weights"
    )
    mask_temperature: float = option(
        1.0,
        "temperature of the key masks' gradient; lower: steeper around the threshold",
        shown="1",
    )
    seed: int = option(0, "seed of weights, patches and noise", shown="0")

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(
            self,
            "steps",
            "epoch_steps",
            "batch_size",
            "patch_size",
            "lr",
            "lr_half_every",
            "val_every",
        )
        check_positive(self, "offset_lr_mult", "mask_temperature")
        if not 0 <= self.clip < float("inf"):
            raise UsageError(f"--clip must be 0 or more, not {self.clip:g}")
        if self.amp_dtype != "bf16" and not self.amp:
            raise UsageError(f"--amp-dtype {self.amp_dtype} goes with --amp")


@dataclass(frozen=True)
class SearchConfig:
    """Searching insert positions (Section 3.2, Table 9)."""

    steps: int = option(200_000, "optimiser steps of both stages together")
    epoch_steps: int = option(1000, "steps that count as one epoch, one row of search.jsonl")
    batch_size: int = option(16, "patches in a step")
    patch_size: int = option(48, "side of a low-quality patch, in pixels")
    lr: float = option(1e-4, "learning rate of the weights at the start, then cosine")
    alpha_lr: float = option(
        1e-4, "learning rate of the architecture parameters as the second stage starts, then cosine"
    )
    warmup: float = option(0.5, "share of the steps that train weights alone (first stage), 0..1")
    lam: float = option(
        0.2, "λ of Eq. 14, the weight of log cost, 0 or more", shown="by --preset; paper: Table 9's"
    )
    tau: float = option(1.0, "gate temperature until the second stage", shown="1")
    tau_end: float = option(0.1, "gate temperature at the end", shown="0.1")
    train_set: str = option(
        "sample", "set of pictures to search on; sample is built in", shown="sample"
    )
    seed: int = option(0, "seed of weights, patches, noise and gates", shown="0")

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(
            self,
            "steps",
            "epoch_steps",
            "batch_size",
            "patch_size",
            "lr",
            "alpha_lr",
            "tau",
            "tau_end",
        )
        if not 0 <= self.lam < float("inf"):
            raise UsageError(f"--lambda must be 0 or more, not {self.lam:g}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"--warmup must lie in 0 <= warmup < 1, not {self.warmup:g}")

    @property
    def first_stage(self) -> int:
        """Steps that train the weights alone; fewer than all."""
        return int(self.steps * self.warmup)


# Presets


def model_preset(preset: str, task: Task, backbone: str = "edsr") -> ModelConfig:
    """The network of a preset, without attention positions. The depth is the paper's in every
    preset, so that Table 9's positions fit; small and tiny are narrower."""
    width = {"paper": 256 if task.name == "sr" else 128, "small": 64, "tiny": 16}[preset]
    size = dict(backbone=backbone, width=width, channels=task.channels, scale=task.scale)
    if backbone in ("rcan", "han"):
        inner = {"paper": 20, "small": 4, "tiny": 2}[preset]
        return ModelConfig(blocks=10, group_blocks=inner, **{**size, "width": min(width, 64)})
    if backbone in ("a2n", "a2n-m"):
        return ModelConfig(blocks=16, reduction=4, **{**size, "width": min(width, 40)})
    deep = task.name == "sr"
    wide = width == 256
    return ModelConfig(blocks=32 if deep else 16, residual_scale=0.1 if wide else 1.0, **size)


def train_preset(preset: str) -> TrainConfig:
    """The length of a training run, and its rates. In the few steps of small and tiny, offsets and
    weights at the common rate hardly leave where they begin; at ten times that rate attention gains
    (results/README.md). The paper names one rate."""
    match preset:
        case "paper":
            return TrainConfig()
        case "small":
            length = {"steps": 20_000, "epoch_steps": 100, "val_every": 1000}
            return TrainConfig(**length, lr=4e-4, lr_half_every=5000, offset_lr_mult=10.0)
        case "tiny":
            length = {"steps": 300, "epoch_steps": 20, "val_every": 100}
            return TrainConfig(
                **length,
                batch_size=8,
                patch_size=32,
                lr=2e-3,
                lr_half_every=100,
                offset_lr_mult=10.0,
            )
    raise UsageError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")


def search_preset(preset: str, task: Task, backbone: str = "edsr") -> SearchConfig:
    """The length of a search and its λ: Table 9's, or 0.2 where it has none. In the minutes of a
    tiny search a module shows little of what it gains, so that λ is a tenth there."""
    lam = PAPER_LAMBDA.get((task.name, backbone), 0.2)
    match preset:
        case "paper":
            return SearchConfig(lam=lam)
        case "small":
            return SearchConfig(steps=10_000, epoch_steps=100, lr=4e-4, alpha_lr=5e-3, lam=lam)
        case "tiny":
            return SearchConfig(
                steps=480,
                epoch_steps=40,
                batch_size=4,
                patch_size=24,
                lr=1e-3,
                alpha_lr=0.15,
                warmup=0.6,
                lam=lam / 10,
            )
    raise UsageError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")


# Checks, JSON


def flag_name(name: str) -> str:
    """A field's flag, without the dashes; `lambda` is no name for a field."""
    return {"lam": "lambda"}.get(name, name.replace("_", "-"))


def format_positions(positions: tuple[int, ...]) -> str:
    """(2, 7, 10) → '2, 7, 10'; nothing → 'none'."""
    return ", ".join(map(str, positions)) or "none"


def check_positive(config: Any, *names: str) -> None:
    """Refuse fields that are not finite and above zero, and seeds below zero."""
    if not 0 <= config.seed < 2**62:
        raise UsageError(f"--seed must be 0 or more and below 2^62, not {config.seed}")
    for name in names:
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise UsageError(f"--{flag_name(name)} must be above 0, not {value:g}")


def check_fields(config: Any) -> None:
    """Refuse values of another type than the field's, or outside its known values: a file may have
    held them."""
    for item in dataclasses.fields(config):
        value, kind = getattr(config, item.name), get_origin(item.type) or item.type
        number = kind is float and type(value) is int
        whole = kind is tuple and isinstance(value, tuple) and all(type(p) is int for p in value)
        if not (type(value) is kind or number) or (kind is tuple and not whole):
            raise UsageError(f"{item.name} must be {item.type}, not {value!r}")
        if kind is float and not math.isfinite(value):
            raise UsageError(f"--{flag_name(item.name)} must be finite, not {value:g}")
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            raise UsageError(
                f"unknown {item.name} {value!r}; known: {', '.join(map(str, choices))}"
            )


def to_json(config: Any) -> str:
    """A configuration as one line of JSON."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def from_dict(kind: type, values: Any) -> Any:
    """A configuration from JSON's dictionary; every field must be there, but for those that older
    files lack, and none besides. Raises UsageError."""
    if not isinstance(values, dict):
        raise UsageError(f"{kind.__name__} must be a JSON object, not {type(values).__name__}")
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    names = {item.name for item in dataclasses.fields(kind)}
    odd = sorted((values.keys() ^ names) - (names & set(LATER)))
    if odd:
        raise UsageError(f"{kind.__name__} has missing or unknown fields: {', '.join(odd)}")
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**as_tuples)
