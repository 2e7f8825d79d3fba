"""Search positions where attention is worth its cost, with a supernet; writes arch.json.

python search.py --task car --q 10
python search.py --task sr --scale 2 --backbone rcan --data DIR --train-set DIV2K
python search.py --task car --q 10 --lambda auto --seeds 3
python search.py --task car --q 10 --method front
torchrun --nproc-per-node 2 search.py --task car --q 10
"""

import argparse
import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from acla import cli, config, console
from acla.config import SearchConfig, Task
from acla.distributed import Processes, join
from acla.errors import UsageError
from acla.files import write_atomically
from acla.restore.inference import keep_memory
from acla.search import lambda_selection, loop
from acla.search.architecture import for_task
from acla.search.loop import SearchPlan, Sets
from acla.search.result import SearchResult, search_table
from acla.training import run_dir, validation

OUT = Path("runs/search")
PLAN = "plan.json"


@dataclass(frozen=True)
class Selection:
    """The choice of λ: automatic, by cross-validation over a grid, or within a budget of
    multiply-adds, or else the plan's; and the number of searches, with a seed each."""

    auto: bool | None = None
    grid: list[float] | None = None
    budget: float | None = None
    seeds: int = 1


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = join(cli.pick_device(args.device))
    keep_memory(processes.device)
    begun = run_dir.open_run(args.out, PLAN, args.resume)
    if begun:
        values = json.loads(begun.read_text(encoding="utf-8"))
        plan = run_dir.resumed_plan(SearchPlan, values, args, begun)
        selection = Selection(**values["flags"])
    else:
        plan = plan_from_flags(args, cli.pick_preset(args.preset, processes.device))
        selection = Selection(args.auto, args.grid, args.budget, args.seeds or 1)
        cli.notice_sample(args)
    processes.require_share(plan.search.batch_size)
    sets = loop.search_sets(plan.search.train_set, args.data)
    processes.wait()  # every process has looked for the plan
    if processes.first and not begun:
        args.out.mkdir(parents=True, exist_ok=True)
        values = {"plan": asdict(plan), "flags": asdict(selection)}
        write_atomically(args.out / PLAN, json.dumps(values, indent=2).encode())
    log_plan(plan, sets, processes)
    result = search(plan, selection, sets, args, processes)
    report(result, args.out)
    processes.leave()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser(None, __doc__)
    cli.add_run_flags(parser, OUT, "search")
    add = parser.add_argument_group("Choosing λ, and several searches").add_argument
    text = "λ of Eq. 14, the weight of log cost, 0 or more; auto: by cross-validation on 20 %% of "
    text += "the training pictures (default: by --preset; paper: Table 9's)"
    options = {"dest": "lam", "type": parse_lambda, "default": argparse.SUPPRESS}
    add("--lambda", metavar="X|auto", help=text, **options)
    usual = ",".join(map(str, lambda_selection.LAMBDAS))
    text = f"values that --lambda auto tries (default: {usual})"
    add("--grid", metavar="X,X…", type=parse_grid, help=text)
    text = "most multiply-adds of the attention for a 48×48 picture, with every key open; λ by "
    text += "bisection, or the best network of the front"
    add("--budget", metavar="X", type=float, help=text)
    text = "searches, from --seed on, and their agreement (default: 1)"
    add("--seeds", metavar="N", type=int, help=text)
    cli.add_flags(parser, SearchConfig, skip=("lam",))
    cli.add_flags(parser, config.ModelConfig, skip=("attention", "positions"))
    args = parser.parse_args(argv)
    args.auto = True if getattr(args, "lam", None) == "auto" else None
    if args.auto:
        del args.lam
    if args.grid and not (args.auto or args.resume):
        raise UsageError("--grid goes with --lambda auto")
    if args.auto and args.budget is not None:
        raise UsageError("--lambda auto and --budget both choose λ: give one of them")
    if args.auto and getattr(args, "method", "paper") == "front":
        raise UsageError("--lambda auto is for --method paper: a front has networks of every cost")
    if args.budget is not None and not 0 < args.budget < float("inf"):
        raise UsageError(f"--budget must be above 0, not {args.budget:g}")
    if args.seeds is not None and not 1 <= args.seeds <= 100:
        raise UsageError(f"--seeds must be 1 to 100, not {args.seeds}")
    return args


def parse_lambda(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wants a number or auto, not {text!r}") from error


def parse_grid(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
        if all(0 <= value < float("inf") for value in values):
            return values
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"wants numbers of 0 or more, 0.1,0.2, not {text!r}")


# Configuration


def plan_from_flags(args: argparse.Namespace, preset: str) -> SearchPlan:
    """The search that flags and preset describe. Raises UsageError."""
    task = cli.task_from_flags(args) or Task()
    backbone = getattr(args, "backbone", "edsr")
    model = for_task(cli.override(config.model_preset(preset, task, backbone), args), task)
    cli.refuse_unused(args, model)
    length = cli.override_length(config.search_preset(preset, task, backbone), args)
    return SearchPlan(task, model, length)


def log_plan(plan: SearchPlan, sets: Sets, processes: Processes) -> None:
    """Print the plan in one line, and the protocol of its PSNR in another."""
    length = plan.search
    console.notice(
        f"{plan.task}: {plan.model.backbone} of {plan.model.blocks} blocks × {plan.model.width}; "
        f"{length.steps} steps of {length.batch_size} patches of {length.patch_size}², the first "
        f"{length.first_stage} for the weights alone; {len(sets.weights)} pictures of "
        f"{length.train_set} for the weights, {len(sets.alpha)} for α; on {processes}"
    )
    console.notice(validation.validation_protocol(plan.task, plan.model.channels))


# The search


def search(
    plan: SearchPlan,
    selection: Selection,
    sets: Sets,
    args: argparse.Namespace,
    processes: Processes,
) -> SearchResult:
    """Choose λ by cross-validation if asked to, then search with one seed or with several."""
    out, notes = args.out, {}
    if selection.auto:
        grid, trials = selection.grid or lambda_selection.LAMBDAS, out / "trials"
        lam, rows = lambda_selection.cross_validate(plan, args.data, trials, grid, processes)
        plan, notes = plan.change(lam=lam), {"cross_validation": rows}
        console.say(lambda_selection.validation_table(rows))
    whole = plan.search.method == "front" or selection.budget is None
    console.notice(f"λ {plan.search.lam:g}" if whole else "λ by bisection")

    def once(plan: SearchPlan, out: Path) -> SearchResult:
        if whole:
            return loop.run_search(plan, sets, out, processes, notes=notes, budget=selection.budget)
        return lambda_selection.within_budget(plan, sets, out, selection.budget, processes, notes)

    if selection.seeds == 1:
        return once(plan, out)
    results = {}
    for seed in range(plan.search.seed, plan.search.seed + selection.seeds):
        console.notice(f"seed {seed}")
        results[seed] = once(plan.change(seed=seed), out / f"seed-{seed}")
    agreed = lambda_selection.agreement(list(results.values()))
    console.say(lambda_selection.agreement_table(agreed))
    best = max(results, key=lambda seed: results[seed].mean_psnr)
    console.say(f"the best by PSNR, seed {best}:")
    folder = out / f"seed-{best}"
    return lambda_selection.adopt(results[best], folder, out, processes, {"agreement": agreed})


def report(result: SearchResult, out: Path) -> None:
    """Print the result, and a notice of gates that are not settled."""
    console.say(search_table(result))
    if result.undecided:
        console.notice(
            f"{result.undecided} of {len(result.architecture.alpha)} gates are still undecided "
            "(chance between 0.1 and 0.9): a longer search, --steps, settles them, or less noise "
            "at its end, as with --gate-noise-end 0.1"
        )
    console.say(f"written: {out / loop.ARCHITECTURE} · {out / loop.LOG} · {out / run_dir.MODEL}")


command = functools.partial(cli.run, main)  # acla-search

if __name__ == "__main__":
    command()
