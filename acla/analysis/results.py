"""Results side by side, as Markdown.

    python -m acla.analysis.results compare RUN_OR_FILE [RUN_OR_FILE…]

One row for all runs of train.py that differ by their seed alone and were scored alike.

    python -m acla.analysis.results scores FILE.json [FILE.json…]

Scores of evaluate.py beside the published ones."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import operator
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from acla import cli, console
from acla.config import OF_KEYS, OF_MASKS, RENAMED, ModelConfig, Task, TrainConfig, from_dict
from acla.errors import NOT_VALID, AclaError, UsageError, reading
from acla.models.factory import describe
from acla.models.serialization import load_model
from acla.training.run_dir import BEST, MODEL

SCORES = "scores.json"
METRICS = {"psnr": ".2f", "ssim": ".4f"}
NOT_COMPARED = {"seed", "epoch_steps", "val_every"}  # do not change the network, or are the run's
# Columns of the short table and the names that published methods have in them
SHORT = {
    "VDSR, DnCNN or IRCNN": ("VDSR", "DnCNN", "IRCNN"),
    "the paper's EDSR": ("EDSR", "baseline"),
    "the paper's EDSR + ACLA": ("EDSR+ACLA", "ACLA"),
}


# Files of evaluate.py


class Score(NamedTuple):
    """A network, the predictions of a folder or the untouched input, scored on a set. model: what
    evaluate.py writes of it; pictures: {file name: dB}; published: {method: mean}."""

    dataset: str
    task: Task
    model: dict[str, Any]
    mean: dict[str, float | None]
    pictures: dict[str, float]
    published: dict[str, dict[str, float]]
    protocol: str

    @property
    def column(self) -> str:
        """The set and the setting: LIVE1 q10, LIVE1 q10 RGB of JPEGs in colour."""
        colour = "RGB" if "colour JPEG" in self.protocol else ""
        return " ".join(filter(None, (self.dataset, self.task.label, colour)))

    @property
    def source(self) -> str:
        """The checkpoint or the folder of predictions; of the untouched input nothing."""
        return self.model.get("checkpoint") or self.model.get("folder") or ""

    @property
    def label(self) -> str:
        """The checkpoint's file name, with its folder where that is a run's, the folder of
        predictions, or the untouched input."""
        path = Path(self.source)
        match self.model["kind"]:
            case "predictions":
                return f"predictions: {path.name}"
            case "baseline":
                return "untouched input"
        of_run = path.name in (MODEL, BEST)
        name = f"{path.parent.name}/{path.stem}" if of_run else path.stem
        return f"ours: {name}" + (", ensemble of 8" if self.model["ensemble"] else "")


def read_json(path: Path, key: str, command: str, parse: Callable[[Any], Any]) -> list[Any]:
    """The parsed items of a list that a command wrote under `key`. Raises AclaError."""
    with reading(path, f"a file of {command}"):
        return [parse(item) for item in json.loads(path.read_text(encoding="utf-8"))[key]]


def read_scores(path: Path) -> list[Score]:
    """The results in a file of evaluate.py --json. Raises AclaError."""

    def parse(result: dict[str, Any]) -> Score:
        pictures = {image["name"]: image["psnr"] for image in result["images"]}
        task = Task(result["task"], result["setting"], result.get("until", 0))
        rest = (result[name] for name in ("published", "protocol"))
        return Score(result["dataset"], task, result["model"], result["mean"], pictures, *rest)

    return read_json(path, "results", "evaluate.py --json", parse)


def scores_table(scores: list[Score], metric: str) -> str:
    """A row for each published method and each scored network, a column for each set and setting.
    Raises AclaError where two results belong in one cell."""
    rows: dict[tuple[str, str], dict[str, float | None]] = {}
    for score in scores:
        for method, figures in score.published.items():
            rows.setdefault((method, ""), {})[score.column] = figures.get(metric)
    for score in scores:
        row = rows.setdefault((score.label, score.source), {})
        if score.column in row:
            raise AclaError(f"{score.column} of {score.label} is there twice: leave out one file")
        row[score.column] = score.mean[metric]

    columns = list(dict.fromkeys(score.column for score in scores))
    lines = [
        [name, *(cell(row.get(c), metric) for c in columns)] for (name, _), row in rows.items()
    ]
    return console.markdown(["", *columns], lines)


def short_table(scores: list[Score], metric: str) -> str:
    """A row for each network's result, beside the published methods of SHORT. Raises UsageError for
    results of something else, AclaError where two belong in one row."""
    lines: dict[str, list[str]] = {}
    for score in scores:
        if score.model["kind"] != "network":
            raise UsageError(f"--short is for networks: leave out {score.label}")
        row = f"{score.task.name} {score.column}"
        if row in lines:
            raise AclaError(f"{score.column} is there twice: leave out one file")
        figures = []
        for names in SHORT.values():
            published = (score.published[n].get(metric) for n in names if n in score.published)
            figures.append(next(published, None))
        lines[row] = [row, *(cell(figure, metric) for figure in (*figures, score.mean[metric]))]
    return console.markdown(["", *SHORT, "ours"], lines.values())


def cell(figure: float | None, metric: str) -> str:
    return "–" if figure is None else f"{figure:{METRICS[metric]}}"


def protocol_lines(scores: list[Score]) -> str:
    """The protocols of the figures, a line for each."""
    return "\n".join(dict.fromkeys(f"- {score.protocol}" for score in scores))


# Runs of train.py


@dataclass(frozen=True)
class Run:
    """A run that was trained and scored. folder: its last name; config: every field of its
    configurations but the seed, and of its scoring; seconds: of training, per step, validation
    included; psnr: {set and setting: mean in dB}; pictures: {set and setting: {file name: dB}};
    commit: of the code that trained it."""

    folder: str
    model: ModelConfig
    config: dict[str, Any]
    seed: int
    seconds: float
    psnr: dict[str, float]
    pictures: dict[str, dict[str, float]]
    protocol: str
    commit: str | None


def read_run(folder: Path) -> Run:
    """A folder of train.py in which evaluate.py --json wrote scores.json. Raises AclaError."""
    file, scored = folder / MODEL, folder / SCORES
    if not scored.is_file():
        raise AclaError(
            f"{folder} holds no {SCORES}: python evaluate.py --dataset NAME --checkpoint {file} "
            f"--json {scored}"
        )
    network, scores = load_model(file), read_scores(scored)
    try:
        training = from_dict(TrainConfig, network.info["train"])
        begun = network.info.get("begun_with")
        parts = (network.task, network.config, training)
        config = {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
        config["begun_with"] = begun and f"{begun['file']} {begun['sha256'][:8]}"
        config["pictures"] = network.info["data"]["train"]
        seconds = network.info["seconds"] / network.info["step"]
    except (UsageError, *NOT_VALID) as error:
        raise AclaError(f"{file}: train.py did not write it: no {error}") from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for score in scores:
        if score.model.get("sha256") != digest:
            raise AclaError(f"{scored}: not the scores of {file} as it is: score it again")
        config |= {name: score.model.get(name) for name in ("tile", "ensemble")}
    return Run(
        folder=folder.resolve().name,
        model=network.config,
        config={name: value for name, value in config.items() if name not in NOT_COMPARED},
        seed=training.seed,
        seconds=seconds,
        psnr={score.column: score.mean["psnr"] for score in scores},
        pictures={score.column: score.pictures for score in scores},
        protocol=protocol_lines(scores),
        commit=network.info.get("commit"),
    )


def read_runs(path: Path) -> list[Run]:
    """The run in a folder, or the runs in a file of `compare --json`, perhaps of an earlier commit
    with other field names. Raises AclaError."""

    def parse(run: dict[str, Any]) -> Run:
        fields = {"config" if name == "how" else name: value for name, value in run.items()}
        config = {RENAMED.get(name, name): value for name, value in fields["config"].items()}
        return Run(**fields | {"model": from_dict(ModelConfig, run["model"]), "config": config})

    if path.is_dir():
        return [read_run(path)]
    return read_json(path, "runs", "acla.analysis.results compare --json", parse)


# Runs side by side


def group_by_seed(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ by their seed alone, together, in the given order. Raises AclaError for a
    run that is there twice, or was scored on other pictures than the first one."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        scored, first = ({c: p.keys() for c, p in r.pictures.items()} for r in (run, runs[0]))
        if scored != first:
            raise AclaError(f"{run.folder} was scored on other pictures than {runs[0].folder}")
        group = groups.setdefault(json.dumps(run.config, sort_keys=True), [])
        for other in group:
            if other.seed == run.seed:
                raise AclaError(f"{run.folder} and {other.folder} are the same run: leave out one")
        group.append(run)
    return list(groups.values())


def group_labels(groups: list[list[Run]]) -> list[str]:
    """The fields of each group that not all groups share: attention acla, offset_radius 6."""
    configs = [group[0].config for group in groups]
    names = dict.fromkeys(itertools.chain(*configs))
    varying = {name for name in names if len({field_text(c.get(name)) for c in configs}) > 1}
    labels = []
    for group, config in zip(groups, configs, strict=True):
        kind = group[0].model.kind
        hidden = {*OF_KEYS * (not kind.keys), *OF_MASKS * (not kind.masked)}
        shown = [f"{n} {field_text(value)}" for n, value in config.items() if n in varying - hidden]
        labels.append(", ".join(shown) or "all")
    return labels


def field_text(value: Any) -> str:
    """A field's value in a label."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def by_seed(group: list[Run], column: str, picture: str | None = None) -> dict[int, float]:
    """{seed: dB} on a set, or on one picture of it."""
    if picture:
        return {run.seed: run.pictures[column][picture] for run in group}
    return {run.seed: run.psnr[column] for run in group}


def gains(ours: dict[int, float], base: dict[int, float]) -> list[float]:
    """Differences in dB to the runs of the base with the same seeds."""
    return [psnr - base[seed] for seed, psnr in ours.items() if seed in base]


def mean_and_deviation(values: Collection[float], sign: str = "", of_mean: bool = False) -> str:
    """The mean, and where there are several values their standard deviation, or their mean's."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{sign}.3f}"
    if len(values) < 2:
        return mean
    deviation = statistics.stdev(values) / (len(values) ** 0.5 if of_mean else 1)
    return f"{mean} ± {deviation:.3f}"


def psnr_cells(ours: dict[int, float], base: dict[int, float]) -> list[str]:
    """Cells in dB: mean ± deviation of PSNR; gain over the base, by seed: mean ± standard error."""
    gained = mean_and_deviation(gains(ours, base), "+", of_mean=True)
    return [mean_and_deviation(ours.values()), gained]


def comparison_table(groups: list[list[Run]]) -> str:
    """What differs, parameters, multiply-adds for a 48×48 input, seconds per step (median), and for
    each set PSNR and the gain over the first row."""
    columns = list(groups[0][0].psnr)
    head = ["", "seeds", "parameters", "multiply-adds", "s/step"]
    head += [text for column in columns for text in (column, "gain")]
    lines = []
    for label, group in zip(group_labels(groups), groups, strict=True):
        size = describe(group[0].model)
        line = [label, str(len(group)), f"{size['params']:,}", f"{size['macs_48x48'] / 1e9:.3f} G"]
        line.append(f"{statistics.median(run.seconds for run in group):.3f}")
        for column in columns:
            base = {} if group is groups[0] else by_seed(groups[0], column)
            line += psnr_cells(by_seed(group, column), base)
        lines.append(line)
    return console.markdown(head, lines)


def pictures_table(groups: list[list[Run]]) -> str:
    """The gain of every picture over the first row, as above, the highest of the last row first."""
    base, *others = groups
    rows = []
    for column, name in ((c, name) for c, names in base[0].pictures.items() for name in names):
        gained = [gains(*(by_seed(g, column, name) for g in (group, base))) for group in others]
        last = statistics.mean(gained[-1]) if gained and gained[-1] else 0.0
        cells = [mean_and_deviation(values, "+", of_mean=True) for values in gained]
        rows.append((last, [column, name, *cells]))
    rows.sort(key=operator.itemgetter(0), reverse=True)
    return console.markdown(["", "picture", *group_labels(groups)[1:]], [line for _, line in rows])


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.results", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare|scores")
    compare = commands.add_parser("compare", help="runs of train.py, seeds together")
    add = compare.add_argument
    text = f"a folder of train.py, with evaluate.py's --json RUN/{SCORES}, or a file of --json; "
    text += "gains are over the first one's row"
    add("paths", nargs="+", type=Path, metavar="RUN_OR_FILE", help=text)
    text = "a second table: the gain of every picture, the highest of the last row first"
    add("--pictures", action="store_true", help=text)
    cli.add_json(compare, "the runs' figures")
    add = commands.add_parser("scores", help="scores beside the published ones").add_argument
    add("paths", nargs="+", type=Path, metavar="FILE", help="of evaluate.py --json")
    text = "PSNR in dB or SSIM (default: psnr)"
    add("--metric", choices=METRICS, default="psnr", help=text)
    add("--dataset", metavar="A,B", help="these sets alone")
    text = "a row for each result, beside the paper's EDSR and a few others alone"
    add("--short", action="store_true", help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "scores":
        scores = [score for path in args.paths for score in read_scores(path)]
        if args.dataset:
            names = args.dataset.split(",")
            if missing := set(names) - {score.dataset for score in scores}:
                raise UsageError(f"--dataset: these files have no {', '.join(sorted(missing))}")
            scores = [score for score in scores if score.dataset in names]
        table = (short_table if args.short else scores_table)(scores, args.metric)
        console.say(f"{table}\n\n{protocol_lines(scores)}")
        return
    console.check_json(args.json)
    runs = [run for path in args.paths for run in read_runs(path)]
    groups = group_by_seed(runs)
    parts = [comparison_table(groups)]
    if args.pictures:
        parts.append(pictures_table(groups))
    parts.append("\n".join(dict.fromkeys(run.protocol for run in runs)))
    stored = {"runs": [dataclasses.asdict(run) for run in runs]}
    console.publish("\n\n".join(parts), stored, args.json)


if __name__ == "__main__":
    cli.run(main)
