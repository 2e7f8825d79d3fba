"""The paper's tables of ablations and rivals anew, our figures beside the paper's:
`python -m acla.analysis.tables 4 11`. Tables 4 to 8, 11 and 12, all super-resolution ×2.

Sizes are counted, not measured, and need neither memory nor pictures. Below a table stands what
differs from the paper by more than 1 % in parameters or 3 % in multiply-adds, and what we know of
why."""

import argparse
import csv
import dataclasses
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from acla import cli, console
from acla.config import ATTENTIONS, PRESETS, ModelConfig, Task, model_preset
from acla.data.datasets import find_set, known_sets
from acla.data.degradations import generator_for
from acla.data.image import load
from acla.data.metrics import score
from acla.errors import CheckpointError, DataError, UsageError
from acla.files import provenance
from acla.models.factory import build_network, describe
from acla.models.serialization import load_model
from acla.restore.inference import restored_pair
from acla.search.architecture import default_positions
from kernels.timing import paired

TABLES = (4, 5, 6, 7, 8, 11, 12)
TASK = Task("sr", 2)
SETS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
SIDE = 48  # of the picture that multiply-adds and times are for, in pixels
# Relative differences from the paper that are told
LIMITS = {"params": 0.01, "macs": 0.03}
SHOWN = {"params": ("parameters", "M", 1e6), "macs": ("multiply-adds", "G", 1e9)}
# Of runs; they hold no finished network, or the one that the validation pictures chose
OTHERS = ("state.safetensors", "supernet.safetensors", "best.safetensors")
ROUNDS, SECONDS = 7, 3.0  # of timing, at least


@dataclass
class Row:
    """A row of a table. network: None where we have none; params and macs: of it; psnr: {set: dB}
    of `checkpoint`; ms: median of one picture; ratio: median of its time over the backbone's.
    paper: the printed figures by the same names, and psnr; notes: why params or macs differ."""

    table: int
    method: str
    backbone: ModelConfig
    network: ModelConfig | None
    paper: dict[str, Any]
    notes: dict[str, str]
    params: int | None = None
    macs: int | None = None
    psnr: dict[str, float] = dataclasses.field(default_factory=dict)
    checkpoint: str | None = None
    ms: float | None = None
    ratio: float | None = None


# What the paper prints, and the networks


@functools.cache
def printed_rows() -> list[dict[str, str]]:
    """The figures of the tables as they are printed, with the systems they are for: backbone
    (`base`, or a network of another name), attention, keys (default: its own), after every how many
    blocks (default: where the paper inserts it), and notes on figures that ours differ from."""
    with open(Path(__file__).with_name("ablations.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def system(row: dict[str, str], preset: str) -> ModelConfig:
    """The network of a printed row, in a preset's size."""
    size = model_preset(preset, TASK, row["backbone"])
    attention, blocks = row["attention"], size.blocks
    keys, positions = int(row["keys"] or ATTENTIONS[attention].keys), ()
    if row["every"]:
        every = int(row["every"])
        positions = tuple(range(every, blocks + 1, every))
    elif attention != "none":
        positions = default_positions(attention, TASK, row["backbone"], blocks)
    return replace(size, attention=attention, keys=keys, positions=positions)


def make_rows(table: int, preset: str) -> list[Row]:
    """The rows of a table with our sizes, not yet scored or timed."""
    printed = [row for row in printed_rows() if int(row["table"]) == table]
    rows = []
    for row in printed:
        base = {**row, "backbone": row["base"], "attention": "none", "keys": "", "every": ""}
        paper: dict[str, Any] = {
            "params": round(1e6 * float(row["params_M"])) if row["params_M"] else None,
            "macs": round(1e9 * float(row["macs_G"])) if row["macs_G"] else None,
            "psnr": {name: float(row[name]) for name in SETS if row[name]},
        }
        if row["ms"]:
            plain = {r["backbone"]: float(r["ms"]) for r in printed if r["attention"] == "none"}
            paper |= {"ms": float(row["ms"]), "ratio": float(row["ms"]) / plain[row["base"]]}
        notes = {kind: row[f"{kind}_note"] for kind in LIMITS if row[f"{kind}_note"]}
        network = system(row, preset) if row["backbone"] else None
        made = Row(table, row["method"], system(base, preset), network, paper, notes)
        if network:
            size = sizes(network)
            made.params, made.macs = size["params"], size[f"macs_{SIDE}x{SIDE}"]
        rows.append(made)
    return rows


sizes = functools.cache(functools.partial(describe, side=SIDE))  # several tables have EDSR


# Scores of trained networks


def find_checkpoints(folder: Path) -> dict[ModelConfig, Path]:
    """The trained networks below a folder that are for the tables' task, by `what_counts`; of
    several alike the first by name."""
    found: dict[ModelConfig, Path] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if path.name in OTHERS:
            continue
        try:
            network = load_model(path)
        except CheckpointError as error:
            console.notice(f"left out: {error}")
            continue
        if network.task == TASK and {"train", "imported"} & network.info.keys():
            first = found.setdefault(what_counts(network.config), path)
            if first != path:
                console.notice(f"left out: {path} has the configuration of {first}")
    if not found:
        console.notice(f"{folder}: no network for {TASK} is there")
    return found


def what_counts(config: ModelConfig) -> ModelConfig:
    """The configuration but for what a trained network does not show: how its modules began, and
    keys that no module has."""
    attention = ATTENTIONS[config.attention].module
    keys = config.keys if ATTENTIONS[attention].keys else 0
    starts = {"offset_radius": ModelConfig.offset_radius, "mask_bias": ModelConfig.mask_bias}
    return replace(config, attention=attention, keys=keys, **starts)


def add_scores(
    rows: Sequence[Row], files: dict[ModelConfig, Path], root: Path, device: torch.device
) -> None:
    """Score every row that has a checkpoint on its table's sets, those that are there."""
    there, wanted = known_sets(root), rows[0].paper["psnr"]
    lost = [name for name in wanted if name not in there]
    if lost:
        console.notice(f"not scored, for {root} does not hold them: {', '.join(lost)}")
    names = tuple(name for name in wanted if name in there)
    for row in rows:
        path = files.get(what_counts(row.network)) if row.network else None
        if path:
            row.checkpoint, row.psnr = str(path), scores_of(path, names, root, device)


@functools.cache
def scores_of(
    path: Path, names: tuple[str, ...], root: Path, device: torch.device
) -> dict[str, float]:
    """{set: mean PSNR in dB}, by the protocol. Raises CheckpointError for an answer that is not
    finite, DataError for a picture too small to be scored."""
    network = load_model(path)
    network.model.to(device)
    found = {}
    for name in names:
        psnr = []
        for file in console.progress(find_set(name, root), desc=f"{path.name}, {name}"):
            try:
                made = restored_pair(network, load(file), TASK, generator_for(file.stem))
                psnr.append(score(*made, TASK)[0])
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {file.name}: {error}") from error
            except DataError as error:
                raise DataError(f"{file}: {error}") from error
        found[name] = statistics.mean(psnr)
    return found


# Times


def add_times(rows: Sequence[Row], device: torch.device) -> None:
    """Time every network beside its backbone; those of one backbone take turns, so that the
    machine's moods hit all of them. New weights: every key is kept."""
    for base in dict.fromkeys(row.backbone for row in rows):
        own = [row for row in rows if row.backbone == base and row.network]
        taken = in_turns(list(dict.fromkeys([base, *(row.network for row in own)])), device)
        for row in own:
            pairs = zip(taken[row.network], taken[base], strict=True)
            row.ms = statistics.median(taken[row.network])
            row.ratio = statistics.median(ours / plain for ours, plain in pairs)


def in_turns(
    networks: Sequence[ModelConfig], device: torch.device
) -> dict[ModelConfig, list[float]]:
    """Milliseconds of each network on one picture, once a round."""
    picture = torch.rand(1, TASK.channels, SIDE, SIDE, device=device)
    models = [build_network(config).eval().to(device) for config in networks]
    calls = [functools.partial(model, picture) for model in models]
    with torch.no_grad():
        taken = paired(calls, device.type, SECONDS, ROUNDS)
    return dict(zip(networks, taken, strict=True))


# What comes out


def markdown(rows: Sequence[Row], timed: bool) -> str:
    """The table; in every cell ours, and the paper's in brackets."""
    paper = [row.paper for row in rows]
    columns = {"": [row.method for row in rows]}
    for kind, (name, unit, factor) in SHOWN.items():
        ours = [getattr(row, kind) for row in rows]
        columns[f"{name}, {unit}"] = both(ours, [p[kind] for p in paper], factor)
    for name in paper[0]["psnr"]:
        ours = [row.psnr.get(name) for row in rows]
        columns[f"{name}, dB"] = both(ours, [p["psnr"][name] for p in paper])
    if timed or "ms" in paper[0]:
        for kind, name in (("ms", "ms (on a V100)"), ("ratio", "time over backbone's")):
            ours = [getattr(row, kind) for row in rows]
            columns[name] = both(ours, [p.get(kind) for p in paper])
    return console.markdown(list(columns), zip(*columns.values(), strict=True))


def both(
    ours: Sequence[float | None], paper: Sequence[float | None], factor: float = 1
) -> list[str]:
    """Cells with our figures and, in brackets, the paper's."""
    shown = [["–" if v is None else f"{v / factor:.2f}" for v in part] for part in (ours, paper)]
    return [f"{a} ({b})" for a, b in zip(*shown, strict=True)]


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line for each size that differs from the paper's by more than the limits, and why."""
    lines = []
    for row in rows:
        for kind, (name, unit, factor) in SHOWN.items():
            ours, paper = getattr(row, kind), row.paper[kind]
            if ours is None or paper is None or abs(ours / paper - 1) <= LIMITS[kind]:
                continue
            why = row.notes.get(kind, "no count we know gives it.")
            lines.append(
                f"- Table {row.table}, {row.method}, {name}: ours {ours / factor:.2f} {unit}, the "
                f"paper's {paper / factor:.2f} {unit} ({100 * (ours / paper - 1):+.1f} %): {why}"
            )
    return lines


def told(table: int, rows: Sequence[Row], preset: str, timed_on: str | None) -> str:
    """A table as text, with its remarks; those make sense at the paper's size alone. timed_on: what
    the times were taken on, if they were."""
    what = "multiply-adds and ms" if timed_on else "multiply-adds"
    title = f"Table {table}, ×{TASK.scale}: ours (the paper's); {what} for {SIDE}×{SIDE} pixels, "
    title += "every key kept"
    if timed_on:
        title += f"; ms: median, {timed_on}"
    below = remarks(rows)
    if preset != "paper":
        title, below = f"{title}; preset {preset}, narrower than the paper's networks", []
    return "\n".join(
        [title, "", markdown(rows, bool(timed_on)), *(["", *below] if below else []), ""]
    )


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m acla.analysis.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(map(str, TABLES))
    parser.add_argument(
        "tables", nargs="+", type=int, choices=TABLES, metavar="N", help=f"one or more of {known}"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="paper", help="size of the networks (default: paper)"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="score the trained networks below it on the tables' sets in --data",
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="also time one picture through every network and its backbone, in turns; at the "
        "paper's size about a minute a table on a CPU, and up to 2 GB",
    )
    parser.add_argument(
        "--json", metavar="FILE|-", help="write the rows there; - is standard output"
    )
    cli.add_common_flags(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse impossible flags before any work is done. Raises UsageError."""
    if args.checkpoints and not args.checkpoints.is_dir():
        raise UsageError(f"--checkpoints {args.checkpoints}: there is no such folder")
    if args.checkpoints and not args.data:
        raise UsageError("--checkpoints needs pictures to score: give --data DIR or set ACLA_DATA")
    console.check_json(args.json)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    device = cli.pick_device(args.device)
    files = find_checkpoints(args.checkpoints) if args.checkpoints else {}
    made_on = provenance(device)
    timed_on = f"{made_on['device']}, {made_on['threads']} CPU thread(s)" if args.time else None
    done: list[Row] = []
    for table in dict.fromkeys(args.tables):
        rows = make_rows(table, args.preset)
        if files:
            add_scores(rows, files, args.data, device)
        if args.time:
            add_times(rows, device)
        if args.json != "-":
            console.say(told(table, rows, args.preset, timed_on))
        done += rows
    result = {"preset": args.preset, "rows": [dataclasses.asdict(row) for row in done]}
    result |= {"side": SIDE, "provenance": made_on}
    console.publish(None, result, args.json)


if __name__ == "__main__":
    cli.run(main)
