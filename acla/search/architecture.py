"""Where the attention stands: arch.json, as a search writes it, Table 9, or flags. Standard library
only."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from acla.cli import override, task_from_flags
from acla.config import (
    ATTENTIONS,
    PAPER_POSITIONS,
    ModelConfig,
    Task,
    from_dict,
    model_preset,
)
from acla.errors import NOT_VALID, AclaError, UsageError

EVEN = 4  # modules of attention that the paper does not search positions for
COST_UNIT = "FLOPs per picture of patch × patch (a multiply-add is two)"


@dataclass(frozen=True)
class Architecture:
    """What a search found. model: the derived network; alpha: α_j of every block; cost: Eq. 13 of
    the derived network at the mask density met, in COST_UNIT for low-quality pictures of patch ×
    patch pixels; evidence: JSON values that say where it comes from (commit, versions, data, the
    search's configuration)."""

    task: Task
    model: ModelConfig
    lam: float
    seed: int
    alpha: tuple[float, ...]
    cost: float
    patch: int
    evidence: dict = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The text of arch.json."""
        return json.dumps(
            {
                "task": self.task.name,
                "setting": self.task.setting,
                "until": self.task.until,
                "backbone": self.model.backbone,
                "attention": self.model.attention,
                "positions": self.model.positions,
                "keys": self.model.keys,
                "lambda": self.lam,
                "seed": self.seed,
                "alpha": self.alpha,
                "cost": self.cost,
                "cost_unit": COST_UNIT,
                "patch": self.patch,
                "model": dataclasses.asdict(self.model),
                "evidence": self.evidence,
            },
            indent=2,
        )


def read_architecture(path: Path) -> Architecture:
    """Read an arch.json. Raises AclaError with the file and what is wrong."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        task = Task(values["task"], values["setting"], values.get("until", 0))
        model = from_dict(ModelConfig, values["model"])
        for name in ("backbone", "attention", "keys"):
            if values[name] != getattr(model, name):
                raise ValueError(
                    f"{name} is {values[name]!r}, but model says {getattr(model, name)!r}"
                )
        if tuple(values["positions"]) != model.positions:
            raise ValueError("positions differ from those in model")
        alpha = tuple(map(float, values["alpha"]))
        numbers = float(values["lambda"]), int(values["seed"]), alpha, float(values["cost"])
        evidence = dict(values.get("evidence", {}))
        return Architecture(task, model, *numbers, int(values["patch"]), evidence)
    except FileNotFoundError as error:
        raise AclaError(f"{path}: there is no such file; search.py writes one") from error
    except (OSError, UsageError, *NOT_VALID) as error:
        raise AclaError(f"{path}: not a valid arch.json: {error!r}") from error


def paper_positions(task: Task, backbone: str) -> tuple[int, ...]:
    """Table 9's positions. Raises UsageError where the paper has none."""
    if (task.name, backbone) not in PAPER_POSITIONS:
        known = ", ".join(f"{t} on {b}" for t, b in PAPER_POSITIONS)
        raise UsageError(
            f"Table 9 has no positions for {task.name} on {backbone} (it has {known}): "
            "give --arch none, --positions, or --arch FILE from search.py"
        )
    return PAPER_POSITIONS[task.name, backbone]


def even_positions(blocks: int) -> tuple[int, ...]:
    """Four positions spread evenly: after every eighth of 32 blocks. Raises UsageError for fewer
    than four blocks."""
    if blocks < EVEN:
        raise UsageError(
            f"{EVEN} evenly spread modules do not fit {blocks} blocks: give --positions, or "
            f"--blocks {EVEN} or more"
        )
    return tuple(round(i * blocks / EVEN) for i in range(1, EVEN + 1))


def default_positions(attention: str, task: Task, backbone: str, blocks: int) -> tuple[int, ...]:
    """Where the paper inserts this attention: at Table 9's positions what it searched, evenly what
    it compares with (Section 4.5, A.3). Raises UsageError."""
    if ATTENTIONS[attention].at_searched:
        return paper_positions(task, backbone)
    return even_positions(blocks)


def choose_network(
    args: argparse.Namespace, preset: str, source: Architecture | None
) -> tuple[Task, ModelConfig]:
    """The task and network that train.py's flags ask for.

    The size comes from `source`, or from the preset if one is asked for; attention, positions and
    keys from the flags, else from `source`, else the paper's for that attention."""
    given = vars(args)
    asked = task_from_flags(args)
    if source and asked and asked.name != source.task.name:
        raise UsageError(f"{args.arch} was searched for {source.task}, not for {asked}")
    task = asked or (source.task if source else Task())
    backbone = given.get("backbone", source.model.backbone if source else "edsr")
    if source and backbone != source.model.backbone:
        raise UsageError(f"{args.arch} was searched on {source.model.backbone}, not on {backbone}")
    size = source.model if source and not args.preset else model_preset(preset, task, backbone)
    usual = "none" if args.arch == "none" else source.model.attention if source else "acla"
    attention, blocks = given.get("attention", usual), given.get("blocks", size.blocks)
    if args.arch == "none" and attention != "none":
        raise UsageError(f"--arch none and --attention {attention} contradict each other")
    keys, positions = ATTENTIONS[attention].keys, given.get("positions", ())
    if source and attention == source.model.attention:
        keys = source.model.keys
    if attention != "none" and "positions" not in given:
        if source:
            positions = source.model.positions
        else:
            positions = default_positions(attention, task, backbone, blocks)
    chosen = {"attention": attention, "keys": keys, "positions": positions, "blocks": blocks}
    network = dataclasses.replace(size, scale=task.scale, **chosen)
    return task, for_task(override(network, args), task)


def for_task(network: ModelConfig, task: Task) -> ModelConfig:
    """The network, if its pictures have as many channels as the task's may have. Raises
    UsageError."""
    fixed = {"car": 1, "demosaic": 3}.get(task.name, network.channels)
    if network.channels != fixed:
        raise UsageError(f"--channels {network.channels}: {task.name} has {fixed} by its protocol")
    return network
