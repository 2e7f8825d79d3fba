"""Draw how searches went: `python -m acla.analysis.plots DIR [DIR…]` (extra `report`).

Fronts of --method front share a panel, with --truth that of `acla.analysis.truth` too."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from acla import cli, console
from acla.analysis.ranking import mean_psnr, pareto
from acla.analysis.truth import read_truth
from acla.config import format_positions
from acla.errors import UsageError
from acla.files import read_rows
from acla.search.architecture import Candidate, read_architecture
from acla.search.loop import ARCHITECTURE, LOG

COST = "expected cost (M multiply-adds of a patch)"


def read_log(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a folder's search.jsonl, a row for each epoch. Raises AclaError."""
    path, names = folder / LOG, ("step", "alpha", "tau", "cost", "kept", "val_psnr")
    rows = read_rows(path, "a log of search.py", names)
    log = {name: np.array([row[name] for row in rows]) for name in names}
    return log | {"cost": log["cost"] / 2e6}


def draw_searches(folders: list[Path], out: Path, truth: Path | None = None) -> None:
    """A column for each search: α over steps, a line a position; expected cost, keys kept and τ
    over steps. In a last column, validation PSNR over cost, a curve for each search that ends in a
    dot; below it gain over cost of fronts and of a file of `acla.analysis.truth`. Of fronts alone,
    whose α never moves, this last panel."""
    pyplot = require_pyplot()
    if all(front_of(folder) for folder in folders):
        figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
        draw_fronts(axis, folders, truth)
        save_figure(figure, out)
        return
    logs = [read_log(folder) for folder in folders]
    figure, axes = pyplot.subplots(
        2, len(logs) + 1, figsize=(5 * len(logs) + 5, 8), squeeze=False, layout="constrained"
    )
    draw_fronts(axes[1, -1], folders, truth)
    trade = axes[0, -1]
    for folder, log, (top, bottom) in zip(folders, logs, axes.T, strict=False):
        draw_alpha(top, log)
        draw_cost(bottom, log)
        top.set_title(folder.name)
        trade.plot("cost", "val_psnr", "o-", data=log, lw=0.8, markevery=[-1], label=folder.name)
    trade.set(xlabel=COST, ylabel="validation PSNR (dB)")
    trade.legend()
    save_figure(figure, out)


def front_of(folder: Path) -> tuple[Candidate, ...]:
    """The networks of a search's front; none of the paper's method, or before its end."""
    path = folder / ARCHITECTURE
    return read_architecture(path).front if path.is_file() else ()


def draw_fronts(axis: Any, folders: list[Path], truth: Path | None) -> None:
    """The gain in dB over no attention, over the attention's multiply-adds: of the networks of each
    front by the supernet; of every network of the truth and, named, its best ones."""
    for folder in folders:
        front = front_of(folder)
        gains = [one.psnr - front[0].psnr for one in front]
        if front:
            axis.plot([one.macs / 1e6 for one in front], gains, "o-", label=folder.name)
    if truth:
        _, rows = read_truth(truth)
        psnr = mean_psnr(rows)
        cost = {row["positions"]: row["attention_macs_48x48"] / 1e6 for row in rows}
        gain = {positions: value - psnr[()] for positions, value in psnr.items()}
        axis.plot(cost.values(), [gain[p] for p in cost], ".", color="gray", label="truth")
        for positions in pareto(psnr):
            at = cost[positions], gain[positions]
            axis.annotate(format_positions(positions), at, fontsize=8)
    if not axis.has_data():
        axis.axis("off")
        return
    axis.set(xlabel="M multiply-adds of attention, 48×48", ylabel="gain over no attention (dB)")
    axis.legend()


def draw_alpha(axis: Any, log: dict[str, np.ndarray]) -> None:
    """α of every position; those that end open are named."""
    for j, values in enumerate(log["alpha"].T, 1):
        is_open = values[-1] > 0
        axis.plot(log["step"], values, lw=2 if is_open else 0.8, alpha=1 if is_open else 0.5)
        if is_open:
            axis.annotate(str(j), (log["step"][-1], values[-1]), fontsize=9)
    axis.axhline(0, color="black", lw=0.5)
    axis.set(xlabel="step", ylabel="α (numbers: positions open at the end)")


def draw_cost(axis: Any, log: dict[str, np.ndarray]) -> None:
    """Expected cost, and on the right the share of keys kept and τ."""
    axis.plot("step", "cost", data=log, color="C0")
    axis.set(xlabel="step", ylabel=COST, ylim=(0, None))
    right = axis.twinx()
    right.plot("step", "kept", data=log, color="C1", label="keys kept")
    right.plot("step", "tau", data=log, color="C2", ls="--", label="τ")
    right.set(ylim=(0, None))
    right.legend(loc="lower left")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.plots", __doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="of search.py's --out")
    text = "of acla.analysis.truth, to draw beside fronts"
    add("--truth", type=Path, metavar="FILE", help=text)
    add("--out", type=Path, metavar="FILE", help="picture to write (default: DIR/search.png)")
    args = parser.parse_args(argv)
    args.out = args.out or args.folders[0] / "search.png"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    cli.check_output(args.out, True, ".png", ".svg", ".pdf")
    draw_searches(args.folders, args.out, args.truth)
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


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, and close it."""
    figure.savefig(path, dpi=110)
    require_pyplot().close(figure)


if __name__ == "__main__":
    cli.run(main)
