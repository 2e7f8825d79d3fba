"""Draw how searches went: `python -m acla.analysis.plots DIR [DIR…]` (extra `report`)."""

import argparse
import json
from pathlib import Path
from typing import Any

from acla import cli, console
from acla.errors import NOT_VALID, AclaError, UsageError


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's search.jsonl. Raises AclaError."""
    path = folder / "search.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise AclaError(f"{path}: there is no such file; search.py writes one") from error
    except NOT_VALID as error:
        raise AclaError(f"{path}: not a log of search.py: {error}") from error
    for row in rows or [{}]:
        there = row.keys() if isinstance(row, dict) else set()
        if lacking := {"step", "alpha", "tau", "cost", "kept", "val_psnr"} - there:
            names = ", ".join(sorted(lacking))
            raise AclaError(f"{path}: not a log of search.py: no {names} in it")
    return rows


def draw(folders: list[Path], out: Path) -> None:
    """A column for each search: α over steps, a line a position; expected cost, keys kept and τ
    over steps. In a last column, validation PSNR over cost, a curve for each search."""
    pyplot = require_pyplot()
    logs = [read_log(folder) for folder in folders]
    figure, axes = pyplot.subplots(
        2, len(logs) + 1, figsize=(5 * len(logs) + 5, 8), squeeze=False, layout="constrained"
    )
    for folder, rows, (top, bottom) in zip(folders, logs, axes.T, strict=False):
        draw_alpha(top, rows, folder.name)
        draw_cost(bottom, rows)
    draw_trade(axes[0, -1], folders, logs)
    axes[1, -1].axis("off")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def draw_alpha(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    """α of every position; those that end open are named."""
    steps = [row["step"] for row in rows]
    for j in range(len(rows[0]["alpha"])):
        values = [row["alpha"][j] for row in rows]
        is_open = values[-1] > 0
        axis.plot(steps, values, lw=2 if is_open else 0.8, alpha=1 if is_open else 0.5)
        if is_open:
            axis.annotate(str(j + 1), (steps[-1], values[-1]), fontsize=9)
    axis.axhline(0, color="black", lw=0.5)
    axis.set(title=title, xlabel="step", ylabel="α (numbers: positions open at the end)")


def draw_cost(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Expected cost, and on the right the share of keys kept and τ."""
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["cost"] / 2e6 for row in rows], color="C0")
    axis.set(xlabel="step", ylabel="expected cost (M multiply-adds of a patch)", ylim=(0, None))
    right = axis.twinx()
    right.plot(steps, [row["kept"] for row in rows], color="C1", label="keys kept")
    right.plot(steps, [row["tau"] for row in rows], color="C2", ls="--", label="τ")
    right.set(ylim=(0, None))
    right.legend(loc="lower left")


def draw_trade(axis: Any, folders: list[Path], logs: list[list[dict[str, Any]]]) -> None:
    """PSNR of the network derived after each epoch over the expected cost; a dot where it ended."""
    for folder, rows in zip(folders, logs, strict=True):
        costs, scores = [r["cost"] / 2e6 for r in rows], [r["val_psnr"] for r in rows]
        (line,) = axis.plot(costs, scores, lw=0.8, label=folder.name)
        axis.plot(costs[-1], scores[-1], "o", color=line.get_color())
    axis.set(xlabel="expected cost (M multiply-adds of a patch)", ylabel="validation PSNR (dB)")
    axis.legend()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m acla.analysis.plots",
        description="Draw how searches went, a column for each.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="of search.py's --out")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="picture to write (default: DIR/search.png)"
    )
    args = parser.parse_args(argv)
    args.out = args.out or args.folders[0] / "search.png"
    if args.out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--out {args.out}: the name must end in .png, .svg or .pdf")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    draw(args.folders, args.out)
    console.say(f"written: {args.out}")


def require_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises UsageError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install '.[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    cli.run(main)
