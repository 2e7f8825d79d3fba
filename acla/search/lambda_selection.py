"""The choice of λ by cross-validation or a budget, and the agreement of several searches."""

import dataclasses
import itertools
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acla import console
from acla.config import format_positions
from acla.data.datasets import find_set, split_every
from acla.distributed import Processes
from acla.errors import AclaError, DataError
from acla.files import write_atomically
from acla.search.architecture import macs
from acla.search.loop import ARCHITECTURE, LOG, SearchPlan, Sets, run_search
from acla.search.result import SearchResult
from acla.training.run_dir import MODEL

LAMBDAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
FOLDS = 2
SHARE = 5  # cross-validation takes one picture in five, and a fifth of the steps
BUDGET_TRIALS = 8


# λ by cross-validation


def cross_validate(
    plan: SearchPlan, root: Path | None, out: Path, grid: Sequence[float], processes: Processes
) -> tuple[float, list[dict[str, Any]]]:
    """λ by cross-validation on 20 % of the training pictures (Section 4.1), and a row for each
    value: short searches on all folds but one; the derived networks are scored on that one.

    Chosen is the largest λ whose PSNR lies within one standard error of the best, picture by
    picture: it is cheaper and not measurably worse. Raises DataError for too few pictures."""
    steps = max(plan.search.steps // SHARE, 2)
    folds = fold_sets(plan.search.train_set, root)
    rows, scores = [], []
    for lam in sorted(set(grid)):
        console.notice(f"cross-validation: λ {lam:g}, {len(folds)} searches of {steps} steps")
        trial = plan.change(lam=lam, steps=steps)
        folders = [out / f"lambda-{lam:g}-fold-{i}" for i in range(1, len(folds) + 1)]
        results = [run_search(trial, *each, processes) for each in zip(folds, folders, strict=True)]
        models = [result.architecture.model for result in results]
        scores.append(np.concatenate([result.psnr for result in results]))
        row = {"lambda": lam, "psnr": float(scores[-1].mean())}
        row |= {"macs": [macs(m) for m in models], "positions": [list(m.positions) for m in models]}
        rows.append(row)
    best = max(scores, key=np.mean)
    for row, score in zip(rows, scores, strict=True):
        lost = best - score
        row["lost"] = float(lost.mean())
        row["lost_error"] = float(lost.std(ddof=1)) / math.sqrt(len(lost))
    return max(row["lambda"] for row in rows if row["lost"] <= row["lost_error"]), rows


def validation_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `cross_validate` as text."""
    return "\n".join(
        f"λ {row['lambda']:<6g} {row['psnr']:.3f} dB, {row['lost']:.3f} ± {row['lost_error']:.3f} "
        f"below the best; {max(row['macs']) / 1e6:.1f} M multiply-adds"
        for row in rows
    )


def fold_sets(name: str, root: Path | None) -> list[Sets]:
    """Folds of every fifth picture of a training set, at least two a fold; each scores once."""
    paths = sorted(find_set(name, root, "train"))
    count = max(math.ceil(len(paths) / SHARE), 2 * FOLDS)
    if len(paths) < count:
        raise DataError(f"{len(paths)} picture(s) of {name} are too few to cross-validate: give λ")
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    folds = [chosen[i::FOLDS] for i in range(FOLDS)]
    return [Sets(*split_every([p for p in chosen if p not in fold], 5), fold) for fold in folds]


# λ by a budget


def within_budget(
    plan: SearchPlan,
    sets: Sets,
    out: Path,
    budget: float,
    processes: Processes,
    notes: dict[str, Any],
) -> SearchResult:
    """The search whose derived network has the most attention within `budget` multiply-adds (see
    `macs`): λ by bisection over second stages, which share the first one. Writes arch.json with a
    row for each λ tried. Raises AclaError where none fits."""
    most = max(m for m in range(plan.model.blocks + 1) if macs(plan.model, m) <= budget)
    lam, too_high, too_low = plan.search.lam or 0.01, None, None
    rows: list[dict[str, Any]] = []
    fitting: dict[int, tuple[SearchResult, Path]] = {}  # by number of modules
    while len(rows) < BUDGET_TRIALS and most not in fitting:
        console.notice(f"budget: λ {lam:.4g}, at most {most} modules fit")
        folder = out / "trials" / f"lambda-{lam:.6g}"
        first_stage = folder.with_name("first-stage.safetensors")
        result = run_search(plan.change(lam=lam), sets, folder, processes, first_stage)
        model = result.architecture.model
        rows.append({"lambda": lam, "positions": list(model.positions), "macs": macs(model)})
        if len(model.positions) <= most:
            too_high = lam
            fitting.setdefault(len(model.positions), (result, folder))
        else:
            too_low = lam
        # The geometric mean of the bounds, or a factor of 4 beyond the only one
        low, high = too_low or too_high / 16, too_high or too_low * 16
        lam = math.sqrt(low * high)
    if not fitting:
        tried = ", ".join(format_positions(row["positions"]) for row in rows)
        raise AclaError(
            f"--budget {budget:g}: no λ up to {rows[-1]['lambda']:g} has a network within it "
            f"(tried: {tried}); raise --budget or --lambda, where the bisection begins"
        )
    # The masks' gradient has λ from the start, and the first stage is the first trial's
    trials = {"macs_48x48": budget, "first_stage_lambda": rows[0]["lambda"], "trials": rows}
    best, folder = fitting[max(fitting)]
    return adopt(best, folder, out, processes, {**notes, "budget": trials})


# Several seeds


def agreement(results: Sequence[SearchResult]) -> dict[str, Any]:
    """The agreement of searches that differ in their seed alone: the number of runs that open each
    position; the mean overlap of two runs (intersection over union; 1 where both are empty); mean
    and standard deviation of cost in FLOPs and of PSNR in dB."""
    opened = [set(result.architecture.model.positions) for result in results]
    counts = Counter(itertools.chain.from_iterable(opened))
    pairs = itertools.combinations(opened, 2)
    overlaps = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]
    report = {
        "seeds": [result.architecture.seed for result in results],
        "positions": [sorted(each) for each in opened],
        "runs_by_position": {str(j): counts[j] for j in sorted(counts)},
        "overlap": float(np.mean(overlaps)),
    }
    figures = {"cost": [result.architecture.cost for result in results]}
    figures["psnr"] = [result.mean_psnr for result in results]
    for name, values in figures.items():
        report[f"{name}_mean"] = float(np.mean(values))
        report[f"{name}_std"] = float(np.std(values, ddof=1))
    return report


def agreement_table(report: dict[str, Any]) -> str:
    """`agreement` as text."""
    runs, by_count = len(report["seeds"]), {}
    for position, count in report["runs_by_position"].items():
        by_count.setdefault(count, []).append(position)
    opened = [f"{', '.join(by_count[k])} in {k} of {runs}" for k in sorted(by_count, reverse=True)]
    rows = zip(report["seeds"], report["positions"], strict=True)
    lines = [
        "seed  positions",
        *(f"{seed:4d}  {format_positions(positions)}" for seed, positions in rows),
        f"agreement: {'; '.join(opened) or 'no position is open in any run'}",
        f"overlap of two runs: {report['overlap']:.0%} of the positions that either opens",
        f"cost: {report['cost_mean'] / 2e6:.1f} ± {report['cost_std'] / 2e6:.1f} M multiply-adds · "
        f"PSNR: {report['psnr_mean']:.3f} ± {report['psnr_std']:.3f} dB",
    ]
    return "\n".join(lines)


def adopt(
    result: SearchResult, source: Path, out: Path, processes: Processes, notes: dict[str, Any]
) -> SearchResult:
    """Copy a search's files from `source` to `out`, arch.json with `notes` in the evidence."""
    evidence = {**result.architecture.evidence, **notes}
    architecture = dataclasses.replace(result.architecture, evidence=evidence)
    if processes.first:
        for name in (LOG, MODEL):
            shutil.copyfile(source / name, out / name)
        write_atomically(out / ARCHITECTURE, architecture.to_json().encode())
    return dataclasses.replace(result, architecture=architecture)
