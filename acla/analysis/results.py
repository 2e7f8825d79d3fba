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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acla import cli, console
from acla.config import MASKED, RENAMED, ModelConfig, Task, TrainConfig, from_dict
from acla.errors import NOT_VALID, AclaError, UsageError
from acla.models.factory import describe
from acla.models.serialization import load_model

MODEL, SCORES = "model.safetensors", "scores.json"
METRICS = {"psnr": ".2f", "ssim": ".4f"}
NOT_COMPARED = {"seed", "epoch_steps", "val_every"}  # do not change the network, or are the run's
OF_KEYS = {"keys", "offset_radius", "offset_lr_mult"}
OF_MASKS = {"mask_bias", "mask_temperature", "mask_noise"}


# Files of evaluate.py


def read_json(path: Path, key: str, command: str, parse: Callable[[Any], Any]) -> list[Any]:
    """The parsed items of a list that a command wrote under `key`. Raises AclaError."""
    try:
        return [parse(item) for item in json.loads(path.read_text(encoding="utf-8"))[key]]
    except FileNotFoundError as error:
        raise AclaError(f"{path}: there is no such file; {command} writes one") from error
    except (UsageError, AttributeError, *NOT_VALID) as error:
        raise AclaError(f"{path}: not a file of {command}: {error!r}") from error


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file of evaluate.py --json. Raises AclaError."""

    def checked(result: dict[str, Any]) -> dict[str, Any]:
        row_label(result), column_label(result), dict(result["published"])
        result["mean"]["psnr"], result["mean"]["ssim"], result["protocol"]
        [(image["name"], image["psnr"]) for image in result["images"]]
        return result

    return read_json(path, "results", "evaluate.py --json", checked)


def row_label(result: dict[str, Any]) -> str:
    """What was scored: the checkpoint's file name, with its folder where that is a run's, the
    folder of predictions, or the untouched input."""
    model = result["model"]
    if model["kind"] == "predictions":
        return f"predictions: {Path(model['folder']).name}"
    if model["kind"] == "baseline":
        return "untouched input"
    path = Path(model["checkpoint"])
    of_run = path.name in (MODEL, "best.safetensors")
    name = f"{path.parent.name}/{path.stem}" if of_run else path.stem
    return f"ours: {name}" + (", ensemble of 8" if model["ensemble"] else "")


def column_label(result: dict[str, Any]) -> str:
    """The set and the setting: LIVE1 q10."""
    task = Task(result["task"], result["setting"], result.get("until", 0))
    return f"{result['dataset']} {task.label}".strip()


def scores_table(results: list[dict[str, Any]], metric: str) -> str:
    """A row for each published method and each scored network, a column for each set and setting.
    Raises AclaError where two results belong in one cell."""
    rows: dict[str, dict[str, float | None]] = {}
    for result in results:
        for method, figures in result["published"].items():
            rows.setdefault(method, {})[column_label(result)] = figures.get(metric)
    sources: dict[str, str] = {}
    for result in results:
        row, column = row_label(result), column_label(result)
        source = result["model"].get("checkpoint") or result["model"].get("folder")
        if sources.setdefault(row, source) != source:
            raise AclaError(
                f"{row} is two, {sources[row]} and {source}: leave out one, or give the files "
                "names that differ"
            )
        if column in rows.setdefault(row, {}):
            raise AclaError(f"{column} of {row} is there twice: leave out one file")
        rows[row][column] = result["mean"][metric]

    def cell(figure: float | None) -> str:
        return "–" if figure is None else f"{figure:{METRICS[metric]}}"

    columns = list(dict.fromkeys(map(column_label, results)))
    lines = [[name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return console.markdown(["", *columns], lines)


def protocol_lines(results: list[dict[str, Any]]) -> str:
    """The protocols of the figures, a line for each."""
    return "\n".join(dict.fromkeys(f"- {result['protocol']}" for result in results))


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
    file = folder / MODEL
    if not (folder / SCORES).is_file():
        raise AclaError(
            f"{folder} holds no {SCORES}: python evaluate.py --dataset NAME --checkpoint {file} "
            f"--json {folder / SCORES}"
        )
    network = load_model(file)
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
    results = read_results(folder / SCORES)
    check_scores(results, file)
    for result in results:
        config |= {name: result["model"].get(name) for name in ("tile", "ensemble")}
    return Run(
        folder=folder.resolve().name,
        model=network.config,
        config={name: value for name, value in config.items() if name not in NOT_COMPARED},
        seed=training.seed,
        seconds=seconds,
        psnr={column_label(r): r["mean"]["psnr"] for r in results},
        pictures={column_label(r): {i["name"]: i["psnr"] for i in r["images"]} for r in results},
        protocol=protocol_lines(results),
        commit=network.info.get("commit"),
    )


def check_scores(results: list[dict[str, Any]], file: Path) -> None:
    """Raises AclaError if results are not those of a run's network, or have no finite PSNR."""
    scores, digest = file.with_name(SCORES), hashlib.sha256(file.read_bytes()).hexdigest()
    for result in results:
        scored = Path(result["model"].get("checkpoint", ""))
        if (scored.parent.name, scored.name) != (file.parent.resolve().name, file.name):
            raise AclaError(f"{scores}: the scores of {scored}, not of {file}")
        if result["model"].get("sha256", digest) != digest:
            raise AclaError(f"{scores}: {file} was written anew since: score it again")
        if None in (result["mean"]["psnr"], *(image["psnr"] for image in result["images"])):
            raise AclaError(f"{scores}: a picture is restored exactly, PSNR has no mean")


def read_runs(path: Path) -> list[Run]:
    """The run in a folder, or the runs in a file of `compare --json`. Raises AclaError."""
    if not path.is_file():
        return [read_run(path)]
    return read_json(path, "runs", "acla.analysis.results compare --json", run_from_json)


def run_from_json(run: dict[str, Any]) -> Run:
    """A run that was stored, perhaps under the field names of an earlier commit."""
    fields = {"config" if name == "how" else name: value for name, value in run.items()}
    fields |= {
        "model": from_dict(ModelConfig, run["model"]),
        "config": {RENAMED.get(name, name): value for name, value in fields["config"].items()},
    }
    return Run(**fields)


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
    varying = {name for name in names if len({show(c.get(name)) for c in configs}) > 1}
    labels = []
    for config in configs:
        hidden = set() if config["keys"] else OF_KEYS | OF_MASKS  # of modules it does not have
        hidden |= set() if config["attention"] in MASKED else OF_MASKS
        shown = [f"{n} {show(value)}" for n, value in config.items() if n in varying - hidden]
        labels.append(", ".join(shown) or "all")
    return labels


def show(value: Any) -> str:
    """A field's value in a label."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def gains(
    group: list[Run], base: list[Run], column: str, picture: str | None = None
) -> list[float]:
    """Differences in dB, on a set or on one picture of it, to the runs of the first row with the
    same seeds; none of that row."""

    def psnr(run: Run) -> float:
        return run.pictures[column][picture] if picture else run.psnr[column]

    of_seed = {} if group is base else {run.seed: psnr(run) for run in base}
    return [psnr(run) - of_seed[run.seed] for run in group if run.seed in of_seed]


def mean_and_deviation(values: list[float], sign: str = "", of_mean: bool = False) -> str:
    """The mean, and where there are several values their standard deviation, or their mean's."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{sign}.3f}"
    if len(values) < 2:
        return mean
    deviation = statistics.stdev(values) / (len(values) ** 0.5 if of_mean else 1)
    return f"{mean} ± {deviation:.3f}"


def comparison_table(groups: list[list[Run]]) -> str:
    """What differs, parameters, multiply-adds for a 48×48 input, seconds per step (median), and for
    each set PSNR in dB (mean ± standard deviation over seeds) and the gain over the first row,
    paired by seed (mean ± standard error)."""
    columns = list(groups[0][0].psnr)
    head = ["", "seeds", "parameters", "multiply-adds", "s/step"]
    head += [text for column in columns for text in (column, "gain")]
    lines = []
    for label, group in zip(group_labels(groups), groups, strict=True):
        size = describe(group[0].model)
        line = [label, str(len(group)), f"{size['params']:,}", f"{size['macs_48x48'] / 1e9:.3f} G"]
        line.append(f"{statistics.median(run.seconds for run in group):.3f}")
        for column in columns:
            gained = gains(group, groups[0], column)
            line.append(mean_and_deviation([run.psnr[column] for run in group]))
            line.append(mean_and_deviation(gained, "+", of_mean=True))
        lines.append(line)
    return console.markdown(head, lines)


def pictures_table(groups: list[list[Run]]) -> str:
    """The gain of every picture over the first row, as above, the highest of the last row first."""
    base, *others = groups
    rows = []
    for column, pictures in base[0].pictures.items():
        for name in pictures:
            gained = [gains(group, base, column, name) for group in others]
            key = statistics.mean(gained[-1]) if gained and gained[-1] else 0.0
            cells = [mean_and_deviation(values, "+", of_mean=True) for values in gained]
            rows.append((key, [column, name, *cells]))
    rows.sort(key=operator.itemgetter(0), reverse=True)
    return console.markdown(["", "picture", *group_labels(groups)[1:]], [line for _, line in rows])


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m acla.analysis.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare|scores")
    compared = commands.add_parser("compare", help="runs of train.py, seeds together")
    compared.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="RUN_OR_FILE",
        help=f"a folder of train.py, with evaluate.py's --json RUN/{SCORES}, or a file of --json; "
        "gains are over the first one's row",
    )
    compared.add_argument(
        "--pictures",
        action="store_true",
        help="a second table: the gain of every picture, the highest of the last row first",
    )
    compared.add_argument(
        "--json", metavar="FILE|-", help="store the runs' figures there; - is standard output"
    )
    scored = commands.add_parser("scores", help="scores beside the published ones")
    scored.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="of evaluate.py --json")
    scored.add_argument(
        "--metric", choices=METRICS, default="psnr", help="PSNR in dB or SSIM (default: psnr)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "scores":
        results = [result for path in args.paths for result in read_results(path)]
        console.say(f"{scores_table(results, args.metric)}\n\n{protocol_lines(results)}")
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
