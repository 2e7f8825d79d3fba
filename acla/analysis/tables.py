"""The paper's tables of ablations and baselines, our figures beside the paper's:
`python -m acla.analysis.tables 4 11`. Tables 4 to 8, 11 and 12, all super-resolution ×2.

Sizes are counted, not measured, and need neither memory nor pictures. Below a table stands what
differs from the paper by more than 1 % in parameters or 3 % in multiply-adds, with the reason where
it is known."""

import argparse
import csv
import dataclasses
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from acla import cli, console
from acla.analysis.results import read_scores
from acla.config import ATTENTIONS, PRESETS, RENAMED, ModelConfig, Task, from_dict, model_preset
from acla.kernels.bench import device_name
from acla.kernels.timing import paired
from acla.models.factory import build_network, describe
from acla.search.architecture import SIDE, default_positions

TABLES = (4, 5, 6, 7, 8, 11, 12)
TASK = Task("sr", 2)
SETS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
# Name, unit, its factor, and the relative difference from the paper above which a remark follows
COUNTS = {"params": ("parameters", "M", 1e6, 0.01), "macs": ("multiply-adds", "G", 1e9, 0.03)}
TIMES = {"ms": "ms (on a V100)", "ratio": "time over backbone's"}
ROUNDS, SECONDS = 7, 3.0  # of timing, at least
FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}


@dataclass
class TableRow:
    """A row of a table. network: None where we have none; ours, paper: {"params", "macs" of a
    SIDE×SIDE input, set: PSNR in dB, "ms": median of one picture, "ratio": median of its time over
    the backbone's}, as far as they are known; notes: why params or macs differ."""

    table: int
    method: str
    backbone: ModelConfig
    network: ModelConfig | None
    ours: dict[str, float]
    paper: dict[str, float]
    notes: dict[str, str]


# The paper's figures, and the sizes of our networks


@functools.cache
def printed_rows() -> list[dict[str, str]]:
    """The figures of the tables as they are printed, with their networks: backbone (`base`, or a
    network of another name), attention, keys (default: its own), after every how many blocks
    (default: where the paper inserts it), and notes on figures that ours differ from."""
    text = Path(__file__).with_name("published_ablations.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def network_of(row: dict[str, str], preset: str) -> ModelConfig:
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


sizes = functools.cache(functools.partial(describe, side=SIDE))  # several tables have EDSR


def make_rows(table: int, preset: str) -> list[TableRow]:
    """The rows of a table with our sizes, not yet scored or timed."""
    printed = [row for row in printed_rows() if int(row["table"]) == table]
    plain_ms = {row["backbone"]: row["ms"] for row in printed if row["attention"] == "none"}
    rows = []
    for row in printed:
        base = {**row, "backbone": row["base"], "attention": "none", "keys": "", "every": ""}
        network = network_of(row, preset) if row["backbone"] else None
        figures = {"params": row["params_M"], "macs": row["macs_G"]}
        paper = {kind: round(COUNTS[kind][2] * float(v)) for kind, v in figures.items() if v}
        paper |= {name: float(row[name]) for name in (*SETS, "ms") if row[name]}
        if row["ms"]:
            paper["ratio"] = paper["ms"] / float(plain_ms[row["base"]])
        ours = {}
        if network:
            size = sizes(network)
            ours = {"params": size["params"], "macs": size[f"macs_{SIDE}x{SIDE}"]}
        notes = {kind: row[f"{kind}_note"] for kind in COUNTS if row[f"{kind}_note"]}
        rows.append(
            TableRow(table, row["method"], network_of(base, preset), network, ours, paper, notes)
        )
    return rows


# Scores and times


def comparable(config: ModelConfig) -> ModelConfig:
    """The configuration without what a trained network does not show: how its modules were
    initialised, and keys that no module has."""
    attention = ATTENTIONS[config.attention].module
    keys = config.keys if ATTENTIONS[attention].keys else 0
    starts = {"offset_radius": ModelConfig.offset_radius, "mask_bias": ModelConfig.mask_bias}
    return replace(config, attention=attention, keys=keys, **starts)


def add_scores(rows: Sequence[TableRow], paths: Sequence[Path]) -> None:
    """Our PSNR, from files of evaluate.py, on the sets of a table in every row whose network was
    scored; of several networks of one configuration that of the first. Raises AclaError."""
    scored: dict[tuple[ModelConfig, str], float | None] = {}
    for score in (score for path in paths for score in read_scores(path)):
        model = {RENAMED.get(name, name): value for name, value in score.model.items()}
        if model["kind"] != "network" or score.task != TASK or model["ensemble"]:
            console.notice(f"left out: {score.column} of {score.label}: not a network for {TASK}")
            continue
        config = from_dict(ModelConfig, {f: v for f, v in model.items() if f in FIELDS})
        key = comparable(config), score.dataset
        if key in scored:
            console.notice(f"left out: {score.column} of {score.label}: the second of its kind")
        scored.setdefault(key, score.mean["psnr"])
    for row in (row for row in rows if row.network):
        own = ((name, scored.get((comparable(row.network), name))) for name in SETS)
        row.ours |= {name: psnr for name, psnr in own if psnr is not None and name in row.paper}


def add_times(rows: Sequence[TableRow], device: torch.device) -> None:
    """Time every network beside its backbone, once a round; those of one backbone take turns, so
    that a change of the machine's speed reaches all of them. Initial weights: every key is kept."""
    picture = torch.rand(1, TASK.channels, SIDE, SIDE, device=device)
    for base in dict.fromkeys(row.backbone for row in rows):
        own = [row for row in rows if row.backbone == base and row.network]
        networks = list(dict.fromkeys([base, *(row.network for row in own)]))
        models = [build_network(config).eval().to(device) for config in networks]
        with torch.no_grad():
            calls = [functools.partial(model, picture) for model in models]
            times = dict(zip(networks, paired(calls, device.type, SECONDS, ROUNDS), strict=True))
        for row in own:
            pairs = zip(times[row.network], times[base], strict=True)
            row.ours["ms"] = statistics.median(times[row.network])
            row.ours["ratio"] = statistics.median(ours / plain for ours, plain in pairs)


# The report


def remarks(rows: Sequence[TableRow]) -> list[str]:
    """A line for each size that differs from the paper's by more than its limit, and why."""
    lines = []
    for row in rows:
        for kind, (name, unit, factor, limit) in COUNTS.items():
            ours, paper = row.ours.get(kind), row.paper.get(kind)
            if ours is None or paper is None or abs(ours / paper - 1) <= limit:
                continue
            reason = row.notes.get(kind, "no count we know gives it.")
            lines.append(
                f"- Table {row.table}, {row.method}, {name}: ours {ours / factor:.2f} {unit}, the "
                f"paper's {paper / factor:.2f} {unit} ({100 * (ours / paper - 1):+.1f} %): {reason}"
            )
    return lines


def text(rows: Sequence[TableRow], preset: str, timed_on: str | None) -> str:
    """A table as Markdown, in every cell ours and the paper's in brackets; at the paper's size with
    remarks. timed_on: the machine of the times, if they were taken."""
    first = rows[0]
    columns = {
        kind: (f"{name}, {unit}", factor) for kind, (name, unit, factor, _) in COUNTS.items()
    }
    columns |= {name: (f"{name}, dB", 1) for name in SETS if name in first.paper}
    columns |= {name: (head, 1) for name, head in TIMES.items() if timed_on or name in first.paper}

    def cell(row: TableRow, name: str, factor: float) -> str:
        pair = (figures.get(name) for figures in (row.ours, row.paper))
        return "{} ({})".format(*("–" if v is None else f"{v / factor:.2f}" for v in pair))

    lines = [[r.method, *(cell(r, name, c[1]) for name, c in columns.items())] for r in rows]
    title = f"Table {first.table}, ×{TASK.scale}: ours (the paper's); multiply-adds"
    title += f"{' and ms' if timed_on else ''} for {SIDE}×{SIDE} pixels, every key kept"
    title += f"; ms: median, {timed_on}" if timed_on else ""
    below = remarks(rows) if preset == "paper" else []
    if preset != "paper":
        title += f"; preset {preset}, narrower than the paper's networks"
    body = console.markdown(["", *(head for head, _ in columns.values())], lines)
    return "\n".join([title, "", body, *(["", *below] if below else []), ""])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.tables", __doc__)
    add = parser.add_argument
    text = f"one or more of {', '.join(map(str, TABLES))}"
    add("tables", nargs="+", type=int, choices=TABLES, metavar="N", help=text)
    text = "size of the networks (default: paper)"
    add("--preset", choices=PRESETS, default="paper", help=text)
    text = "of evaluate.py --json: PSNR of trained networks, beside the paper's"
    add("--scores", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    text = "also time one picture through every network and its backbone, in turns; at the "
    text += "paper's size about a minute a table on a CPU, and up to 2 GB"
    add("--time", action="store_true", help=text)
    cli.add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = cli.pick_device(args.device)
    machine = f"{device_name(device.type)}, {torch.get_num_threads()} CPU thread(s)"
    tables = [make_rows(table, args.preset) for table in dict.fromkeys(args.tables)]
    add_scores([row for rows in tables for row in rows], args.scores)
    for rows in tables:
        if args.time:
            add_times(rows, device)
        console.say(text(rows, args.preset, machine if args.time else None))


if __name__ == "__main__":
    cli.run(main)
