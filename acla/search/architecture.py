"""The positions of the attention: from arch.json, as a search writes it, Table 9, or flags."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from acla.cli import task_from_flags
from acla.config import ATTENTIONS, PAPER_POSITIONS, ModelConfig, Task, from_dict, model_preset
from acla.errors import AclaError, UsageError, reading
from acla.models.cost import full_attention_flops

EVEN = 4  # modules at evenly spread positions
REPEATED = ("backbone", "attention", "positions", "keys")  # of the model, for readers of the file
COST_UNIT = "FLOPs per picture of patch × patch (a multiply-add is two)"
SIDE = 48  # pixels; budgets are for one low-quality picture of 48 × 48, the paper's unit


def macs(model: ModelConfig, modules: int | None = None) -> int:
    """Multiply-adds of a network's attention for one low-quality picture of 48 × 48 with every key
    open, as train.py --describe prints them; or with that many modules, at any positions."""
    modules = len(model.positions) if modules is None else modules
    size = SIDE * SIDE, model.width, model.keys
    return full_attention_flops(model.attention, modules, *size) // 2


@dataclass(frozen=True)
class Candidate:
    """A network of a front. psnr: in dB, on held-out patches with the supernet's weights; macs: of
    the attention (see `macs`); ms: of the network for a 48×48 picture, where measured."""

    positions: tuple[int, ...]
    psnr: float
    macs: int
    ms: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "positions": tuple(map(int, values["positions"]))})


@dataclass(frozen=True)
class Architecture:
    """A searched architecture. model: the derived network; alpha: α_j of every block; cost: Eq. 13
    of the derived network at the measured mask density, in COST_UNIT for low-quality pictures of
    patch × patch pixels; evidence: its origin as JSON values (commit, versions, data, the search's
    configuration); front: of --method front, its networks, the cheapest first."""

    task: Task
    model: ModelConfig
    lam: float
    seed: int
    alpha: tuple[float, ...]
    cost: float
    patch: int
    evidence: dict = dataclasses.field(default_factory=dict)
    front: tuple[Candidate, ...] = ()

    def within(self, budget: float) -> Self:
        """With the front's best network of at most `budget` multiply-adds. Raises UsageError."""
        fitting = [one for one in self.front if one.macs <= budget]
        if not fitting:
            least = f"has {min(one.macs for one in self.front):,}" if self.front else "is missing"
            raise UsageError(
                f"--budget {budget:g}: the cheapest network of the front {least}; raise --budget, "
                "or search with --method front"
            )
        best = max(fitting, key=lambda one: one.psnr)
        model = dataclasses.replace(self.model, positions=best.positions)
        return dataclasses.replace(self, model=model)

    def to_json(self) -> str:
        """The text of arch.json."""
        task, model = dataclasses.asdict(self.task), dataclasses.asdict(self.model)
        values = {"task": task["name"], "setting": task["setting"], "until": task["until"]}
        values |= {name: model[name] for name in REPEATED}
        values |= {"lambda": self.lam, "seed": self.seed, "alpha": self.alpha, "cost": self.cost}
        values |= {"cost_unit": COST_UNIT, "patch": self.patch, "model": model}
        values |= {"evidence": self.evidence}
        if self.front:
            values["front"] = [dataclasses.asdict(one) for one in self.front]
        return json.dumps(values, indent=2)


def read_architecture(path: Path) -> Architecture:
    """Read an arch.json. Raises AclaError with the file and what is wrong."""
    if not path.is_file():
        raise AclaError(f"{path}: there is no such file; search.py writes one")
    with reading(path, "a valid arch.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        task = Task(values["task"], values["setting"], values.get("until", 0))
        model = from_dict(ModelConfig, values["model"])
        for name in REPEATED:
            if values[name] != values["model"][name]:
                raise ValueError(f"{name} is {values[name]}, but {values['model'][name]} in model")
        alpha = tuple(map(float, values["alpha"]))
        lam, seed, cost = float(values["lambda"]), int(values["seed"]), float(values["cost"])
        patch, evidence = int(values["patch"]), dict(values.get("evidence", {}))
        front = tuple(map(Candidate.from_dict, values.get("front", ())))
        return Architecture(task, model, lam, seed, alpha, cost, patch, evidence, front)


def paper_positions(task: Task, backbone: str) -> tuple[int, ...]:
    """Table 9's positions. Raises UsageError where the paper has none."""
    if (task.name, backbone) not in PAPER_POSITIONS:
        known = ", ".join(f"{t} on {b}" for t, b in PAPER_POSITIONS)
        raise UsageError(
            f"Table 9 has no positions for {task.name} on {backbone} (it has {known}): "
            "give --arch none, --positions, or --arch FILE from search.py"
        )
    return PAPER_POSITIONS[task.name, backbone]


def even_spread(blocks: int, count: int) -> tuple[int, ...]:
    """So many positions, at most `blocks`, spread evenly, the last behind the last block."""
    return tuple(round(i * blocks / count) for i in range(1, count + 1))


def default_positions(attention: str, task: Task, backbone: str, blocks: int) -> tuple[int, ...]:
    """The paper's positions: Table 9's for searched attention, for the others four evenly spread
    ones, after every eighth of 32 blocks (Section 4.5, A.3). Raises UsageError."""
    if ATTENTIONS[attention].at_searched:
        return paper_positions(task, backbone)
    if blocks < EVEN:
        raise UsageError(
            f"{EVEN} evenly spread modules do not fit {blocks} blocks: give --positions, or "
            f"--blocks {EVEN} or more"
        )
    return even_spread(blocks, EVEN)


def choose_network(
    args: argparse.Namespace, preset: str, source: Architecture | None
) -> tuple[Task, ModelConfig]:
    """The task and network of train.py's flags.

    The size is that of `source`, or of the preset if --preset is given; attention, positions and
    keys are those of the flags, else of `source`, else the paper's. Raises UsageError."""
    given, asked = vars(args), task_from_flags(args)
    searched = source.model if source else ModelConfig()
    task = asked or (source.task if source else Task())
    backbone = given.get("backbone", searched.backbone)
    if source and task.name != source.task.name:
        raise UsageError(f"{args.arch} was searched for {source.task}, not for {task}")
    if source and backbone != searched.backbone:
        raise UsageError(f"{args.arch} was searched on {searched.backbone}, not on {backbone}")
    attention = given.get("attention", "none" if args.arch == "none" else searched.attention)
    if args.arch == "none" and attention != "none":
        raise UsageError(f"--arch none and --attention {attention} contradict each other")
    size = searched if source and not args.preset else model_preset(preset, task, backbone)
    keys, positions = ATTENTIONS[attention].keys, ()
    if source and attention == searched.attention:
        keys = searched.keys
    if attention != "none" and "positions" not in given:
        blocks = given.get("blocks", size.blocks)
        positions = (
            searched.positions if source else default_positions(attention, task, backbone, blocks)
        )
    chosen = {"attention": attention, "keys": keys, "positions": positions, "scale": task.scale}
    chosen |= {name: given[name] for name in vars(size) if name in given}
    return task, for_task(dataclasses.replace(size, **chosen), task)


def for_task(network: ModelConfig, task: Task) -> ModelConfig:
    """The network, if its number of picture channels fits the task. Raises UsageError."""
    if task.name == "demosaic" and network.channels != 3:
        raise UsageError(f"--channels {network.channels}: demosaic has 3 by its protocol")
    return network
