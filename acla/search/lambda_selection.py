"""Which λ a search should take, and how far several searches agree."""

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
from acla.config import ATTENTIONS, ModelConfig, format_positions
from acla.data.datasets import find_set, sample, split_for_search
from acla.distributed import Processes
from acla.errors import AclaError, DataError
from acla.files import write_atomically
from acla.models.cost import full_attention_flops
from acla.search.loop import Found, Plan, Sets, run

GRID = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
FOLDS = 2
SHARE = 5  # λ is judged on one picture in five, by searches of a fifth of the steps
BUDGET_TRIALS = 8
SIDE = 48  # pixels; a budget is for one low-quality picture of 48 × 48, the paper's unit


# λ by cross-validation


def cross_validate(
    plan: Plan, root: Path | None, out: Path, grid: Sequence[float], processes: Processes
) -> tuple[float, list[dict[str, Any]]]:
    """λ by cross-validation on 20 % of the training pictures (Section 4.1), and a row for each
    value: short searches on all folds but one, the derived networks scored on the pictures of that
    one.

    Chosen is the largest λ whose PSNR lies within one standard error of the best, picture by
    picture: what is not measurably worse is cheaper. Raises DataError for too few pictures."""
    steps = max(plan.search.steps // SHARE, 2)
    folds = fold_sets(plan.search.train_set, root)
    rows, scores = [], []
    for lam in sorted(set(grid)):
        how = dataclasses.replace(plan.search, lam=lam, steps=steps)
        trial = dataclasses.replace(plan, search=how)
        console.notice(f"cross-validation: λ {lam:g}, {len(folds)} searches of {steps} steps")
        found = [
            run(trial, sets, out / f"lambda-{lam:g}-fold-{i}", processes)
            for i, sets in enumerate(folds, 1)
        ]
        models = [one.architecture.model for one in found]
        scores.append(np.array([value for one in found for value in one.psnr]))
        row = {"lambda": lam, "psnr": float(scores[-1].mean())}
        row |= {"macs": [macs(m) for m in models], "positions": [list(m.positions) for m in models]}
        rows.append(row)
    best = max(scores, key=np.mean)
    for row, score in zip(rows, scores, strict=True):
        row["lost"], row["lost_error"] = mean_and_error(best - score)
    return max(row["lambda"] for row in rows if row["lost"] <= row["lost_error"]), rows


def fold_sets(name: str, root: Path | None) -> list[Sets]:
    """Every fifth picture of a training set, at least two a fold, in folds; each scores once."""
    paths = sorted(sample("train") if name == "sample" else find_set(name, root, "train"))
    count = max(math.ceil(len(paths) / SHARE), 2 * FOLDS)
    if len(paths) < count:
        raise DataError(f"{len(paths)} picture(s) of {name} are too few to cross-validate: give λ")
    few = [paths[i * len(paths) // count] for i in range(count)]
    folds = []
    for fold in range(FOLDS):
        score = few[fold::FOLDS]
        rest = [path for path in few if path not in score]
        folds.append(Sets(*split_for_search(rest), score))
    return folds


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


# λ by a budget


def macs(model: ModelConfig) -> int:
    """Multiply-adds of a network's attention for one low-quality picture of 48 × 48, every key
    read, as train.py --describe prints them."""
    masked = ATTENTIONS[model.attention].masked
    flops = full_attention_flops(len(model.positions), SIDE * SIDE, model.width, model.keys, masked)
    return flops // 2


def within_budget(
    plan: Plan,
    sets: Sets,
    out: Path,
    budget: float,
    processes: Processes,
    notes: dict[str, Any],
) -> Found:
    """The search whose derived network adds the most attention that `budget` multiply-adds allow
    (see `macs`): λ by bisection over second stages, which share the first one. Writes arch.json
    with a row for each λ tried. Raises AclaError where no λ tried fits."""
    first_stage = out / "first-stage.safetensors"
    most = plan.model.blocks
    while most and macs(with_modules(plan.model, most)) > budget:
        most -= 1
    lam, too_dear, cheap = plan.search.lam or 0.01, None, None
    rows: list[dict[str, Any]] = []
    best: tuple[Found, Path] | None = None
    for _ in range(BUDGET_TRIALS):
        folder = out / f"lambda-{lam:.6g}"
        console.notice(f"budget: λ {lam:.4g}, at most {most} modules fit")
        if processes.first:
            out.mkdir(parents=True, exist_ok=True)
        how = dataclasses.replace(plan.search, lam=lam)
        found = run(dataclasses.replace(plan, search=how), sets, folder, processes, first_stage)
        model = found.architecture.model
        rows.append({"lambda": lam, "positions": list(model.positions), "macs": macs(model)})
        count = len(model.positions)
        if count <= most:
            if best is None or count > len(best[0].architecture.model.positions):
                best = found, folder
            if count == most:
                break
            cheap = lam
        else:
            too_dear = lam
        if too_dear is None:
            lam = cheap / 4
        elif cheap is None:
            lam = too_dear * 4
        else:
            lam = math.sqrt(cheap * too_dear)
    if best is None:
        raise AclaError(
            f"--budget {budget:g}: no λ up to {rows[-1]['lambda']:g} found a network that cheap "
            f"(tried: {', '.join(format_positions(tuple(row['positions'])) for row in rows)}); "
            "raise --budget or --lambda, where the bisection begins"
        )
    # The masks feel λ from the start, and the first stage is the first trial's
    tried = {"macs_48x48": budget, "first_stage_lambda": rows[0]["lambda"], "trials": rows}
    notes = {**notes, "budget": tried}
    return publish(best[0], best[1], out.parent, processes, notes)


def with_modules(model: ModelConfig, count: int) -> ModelConfig:
    """The network with modules behind its first `count` blocks: any `count` cost the same."""
    return dataclasses.replace(model, positions=tuple(range(1, count + 1)))


# Several searches


def agreement(found: Sequence[Found]) -> dict[str, Any]:
    """How far searches agree that differ in their seed alone: in how many runs each position is
    open; the mean overlap of two runs (intersection over union; 1 where both are empty); mean and
    standard deviation of cost in FLOPs and of PSNR in dB."""
    opened = [set(one.architecture.model.positions) for one in found]
    pairs = list(itertools.combinations(opened, 2))
    overlaps = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]
    counts = Counter(itertools.chain.from_iterable(opened))
    cost = np.array([one.architecture.cost for one in found])
    psnr = np.array([one.mean_psnr for one in found])
    return {
        "seeds": [one.architecture.seed for one in found],
        "positions": [sorted(each) for each in opened],
        "runs_by_position": {str(j): counts[j] for j in sorted(counts)},
        "overlap": float(np.mean(overlaps)) if overlaps else 1.0,
        "cost_mean": float(cost.mean()),
        "cost_std": float(cost.std(ddof=1)),
        "psnr_mean": float(psnr.mean()),
        "psnr_std": float(psnr.std(ddof=1)),
    }


def agreement_table(report: dict[str, Any]) -> str:
    """`agreement` for people."""
    runs = len(report["seeds"])
    lines = ["seed  positions"]
    for seed, positions in zip(report["seeds"], report["positions"], strict=True):
        lines.append(f"{seed:4d}  {format_positions(tuple(positions))}")
    by_count: dict[int, list[str]] = {}
    for position, count in report["runs_by_position"].items():
        by_count.setdefault(count, []).append(position)
    found = [f"{', '.join(by_count[k])} in {k} of {runs}" for k in sorted(by_count, reverse=True)]
    lines += [
        f"agreement: {'; '.join(found) or 'no position is open in any run'}",
        f"overlap of two runs: {report['overlap']:.0%} of the positions that either opens",
        f"cost: {report['cost_mean'] / 2e6:.1f} ± {report['cost_std'] / 2e6:.1f} M multiply-adds · "
        f"PSNR: {report['psnr_mean']:.3f} ± {report['psnr_std']:.3f} dB",
    ]
    return "\n".join(lines)


def publish(
    found: Found, source: Path, out: Path, processes: Processes, notes: dict[str, Any]
) -> Found:
    """Make one of several searches the result in `out`: its log, its network, and its arch.json
    with `notes` among the evidence."""
    evidence = {**found.architecture.evidence, **notes}
    architecture = dataclasses.replace(found.architecture, evidence=evidence)
    if processes.first:
        for name in ("search.jsonl", "model.safetensors"):
            shutil.copyfile(source / name, out / name)
        write_atomically(out / "arch.json", architecture.to_json().encode())
    return dataclasses.replace(found, architecture=architecture)
