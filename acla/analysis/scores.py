"""Results of evaluate.py as one Markdown table beside the published figures:
`python -m acla.analysis.scores FILE.json [FILE.json…]`."""

import argparse
import json
from pathlib import Path
from typing import Any

from acla import cli, console
from acla.config import Task
from acla.errors import NOT_VALID, AclaError, UsageError

OF_RUNS = ("model.safetensors", "best.safetensors")
METRICS = {"psnr": ".2f", "ssim": ".4f"}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file that evaluate.py --json wrote. Raises AclaError."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        for result in results:
            name_row(result), name_column(result), dict(result["published"])
            result["mean"]["psnr"], result["mean"]["ssim"], result["protocol"]
            [(image["name"], image["psnr"]) for image in result["images"]]
    except FileNotFoundError as error:
        raise AclaError(f"{path}: there is no such file; evaluate.py --json writes one") from error
    except (UsageError, *NOT_VALID) as error:
        raise AclaError(f"{path}: not a file of evaluate.py --json: {error!r}") from error
    return results


def name_row(result: dict[str, Any]) -> str:
    """What was scored: the checkpoint's file name, with its folder where that is a run's, the
    folder of pictures that were made elsewhere, or the untouched input."""
    model = result["model"]
    if model["kind"] == "predictions":
        return f"predictions: {Path(model['folder']).name}"
    if model["kind"] == "baseline":
        return "untouched input"
    path = Path(model["checkpoint"])
    name = f"{path.parent.name}/{path.stem}" if path.name in OF_RUNS else path.stem
    return f"ours: {name}" + (", ensemble of 8" if model["ensemble"] else "")


def name_column(result: dict[str, Any]) -> str:
    """The set and the setting: LIVE1 q10."""
    task = Task(result["task"], result["setting"], result.get("until", 0))
    return f"{result['dataset']} {task.label}".strip()


def markdown(results: list[dict[str, Any]], metric: str) -> str:
    """The table: a row for each published method and each network, a column for each set and
    setting. Raises AclaError where two results claim one place."""
    rows: dict[str, dict[str, float]] = {}
    columns = list(dict.fromkeys(name_column(result) for result in results))
    for result in results:
        column = name_column(result)
        for method, figures in result["published"].items():
            rows.setdefault(method, {})[column] = figures.get(metric)
    paths: dict[str, str] = {}
    for result in results:
        path = result["model"].get("checkpoint") or result["model"].get("folder")
        if paths.setdefault(name_row(result), path) != path:
            raise AclaError(
                f"{name_row(result)} is two, {paths[name_row(result)]} and {path}: leave "
                "out one, or give the files names that differ"
            )
        row, column = rows.setdefault(name_row(result), {}), name_column(result)
        if column in row:
            raise AclaError(f"{column} of {name_row(result)} is there twice: leave out one file")
        row[column] = result["mean"][metric]
    lines = [[name, *(cell(row.get(c), metric) for c in columns)] for name, row in rows.items()]
    return console.markdown(["", *columns], lines)


def protocol_lines(results: list[dict[str, Any]]) -> str:
    """How the figures were taken, a line for each way."""
    return "\n".join(dict.fromkeys(f"- {result['protocol']}" for result in results))


def cell(figure: float | None, metric: str) -> str:
    return "–" if figure is None else f"{figure:{METRICS[metric]}}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m acla.analysis.scores", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of evaluate.py --json")
    parser.add_argument(
        "--metric", choices=METRICS, default="psnr", help="PSNR in dB or SSIM (default: psnr)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    results = [result for path in args.files for result in read_results(path)]
    console.say(markdown(results, args.metric))
    console.say("\n" + protocol_lines(results))


if __name__ == "__main__":
    cli.run(main)
