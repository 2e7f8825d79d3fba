"""Runs of train.py side by side, seeds together:

    python -m acla.analysis.compare RUN [RUN…]

One Markdown row for all runs that differ by their seed alone and were scored alike; with --pictures
also what each picture gains."""

import argparse
import dataclasses
import json
import operator
import statistics
from pathlib import Path
from typing import Any

from acla import cli, console
from acla.analysis.runs import SCORES, Run, read_kept, read_run
from acla.config import MASKED
from acla.errors import AclaError
from acla.models.factory import describe

OF_KEYS = ("keys", "offset_radius", "offset_lr_mult")
OF_MASKS = ("mask_bias", "mask_temperature")


def by_seed(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ by their seed alone, together, in the order in which they were named. Raises
    AclaError for a seed that is there twice."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(json.dumps(run.how, sort_keys=True), [])
        for other in group:
            if other.seed == run.seed:
                raise AclaError(f"{run.folder} and {other.folder} are the same run: leave out one")
        group.append(run)
    return list(groups.values())


def require_same_pictures(groups: list[list[Run]]) -> None:
    """Raises AclaError if a run was scored on other pictures than the first one."""
    first, *others = (run for group in groups for run in group)
    scored = {column: names.keys() for column, names in first.pictures.items()}
    for run in others:
        if {column: names.keys() for column, names in run.pictures.items()} != scored:
            raise AclaError(f"{run.folder} was scored on other pictures than {first.folder}")


def name_groups(groups: list[list[Run]]) -> list[str]:
    """A name for each group, of what they have not in common."""
    fields = {name for group in groups for name in group[0].how}
    varying = {n for n in fields if len({show(g[0].how.get(n)) for g in groups}) > 1}
    return [name_group(group, varying) for group in groups]


def name_group(group: list[Run], varying: set[str]) -> str:
    """What a group has that not all groups have: attention acla, ring 6."""
    how = group[0].how
    silent = set() if how["keys"] else {*OF_KEYS, *OF_MASKS}  # how modules would have begun
    silent |= set() if how["attention"] in MASKED else {*OF_MASKS}
    shown = {name: how[name] for name in how if name in varying - silent}
    return ", ".join(f"{name} {show(value)}" for name, value in shown.items()) or "all"


def show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def mean_and_spread(values: list[float], digits: int = 3) -> str:
    """The mean, and the standard deviation where there is more than one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def gains(
    group: list[Run], base: list[Run], column: str, picture: str | None = None
) -> list[float]:
    """Differences in dB, on a set or on one picture of it, to the runs of the first row with the
    same seeds; none of that row."""

    def psnr(run: Run) -> float:
        return run.psnr[column] if picture is None else run.pictures[column][picture]

    of_seed = {run.seed: psnr(run) for run in base}
    return [psnr(run) - of_seed[run.seed] for run in group if run.seed in of_seed and group != base]


def mean_and_error(gains: list[float]) -> str:
    """The mean, and its standard error where there is more than one value."""
    if not gains:
        return "–"
    mean = f"{statistics.mean(gains):+.3f}"
    if len(gains) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(gains) / len(gains) ** 0.5:.3f}"


def markdown(groups: list[list[Run]]) -> str:
    """The table: what differs, parameters, multiply-adds for a 48×48 input, seconds per step
    (median), and for each set PSNR in dB (mean ± standard deviation over seeds) and the gain over
    the first row, paired by seed (mean ± standard error)."""
    first, names = groups[0][0], name_groups(groups)
    head = ["", "seeds", "parameters", "multiply-adds", "s/step"]
    head += [text for column in first.psnr for text in (column, "gain")]
    lines = []
    for name, group in zip(names, groups, strict=True):
        size = describe(group[0].model)
        line = [name, str(len(group)), f"{size['params']:,}"]
        line += [f"{size['macs_48x48'] / 1e9:.3f} G"]
        line += [f"{statistics.median(run.seconds for run in group):.3f}"]
        for column in first.psnr:
            values = [run.psnr[column] for run in group]
            line += [mean_and_spread(values), mean_and_error(gains(group, groups[0], column))]
        lines.append(line)
    return console.markdown(head, lines)


def markdown_of_pictures(groups: list[list[Run]]) -> str:
    """What each picture gains over the first row, as `markdown` gives it, the best of the last row
    first."""
    base, *others = groups
    rows = []
    for column, of_picture in base[0].pictures.items():
        for name in of_picture:
            apart = [gains(group, base, column, name) for group in others]
            best = statistics.mean(apart[-1]) if apart and apart[-1] else 0.0
            rows.append((best, [column, name, *map(mean_and_error, apart)]))
    rows.sort(key=operator.itemgetter(0), reverse=True)
    return console.markdown(["", "picture", *name_groups(groups)[1:]], [line for _, line in rows])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m acla.analysis.compare", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help=f"a folder of train.py, with evaluate.py's --json RUN/{SCORES}, or a file that --json "
        "kept; gains are over the first one's row",
    )
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="a second table: the gain of every picture, the best of the last row first",
    )
    parser.add_argument(
        "--json", metavar="FILE|-", help="keep the runs' figures there; - is standard output"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    console.check_json(args.json)
    runs = [
        run
        for path in args.runs
        for run in (read_kept(path) if path.is_file() else [read_run(path)])
    ]
    groups = by_seed(runs)
    require_same_pictures(groups)
    told = [markdown(groups)]
    if args.pictures:
        told.append(markdown_of_pictures(groups))
    told.append("\n".join(dict.fromkeys(run.protocol for run in runs)))
    kept = {"runs": [dataclasses.asdict(run) for run in runs]}
    console.publish("\n\n".join(told), kept, args.json)


if __name__ == "__main__":
    cli.run(main)
