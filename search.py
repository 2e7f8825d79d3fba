"""Search where attention is worth its cost: a supernet with a module behind every block, then
arch.json.

    python search.py --task car --q 10
    python search.py --task sr --scale 2 --backbone rcan --data DIR --train-set DIV2K
    python search.py --task car --q 10 --lambda auto --seeds 3
    torchrun --nproc-per-node 2 search.py --task car --q 10
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from acla import cli, config, console
from acla.config import SearchConfig, Task
from acla.distributed import Processes, join
from acla.errors import CheckpointError, UsageError
from acla.files import write_atomically
from acla.search.architecture import for_task
from acla.search.lambda_selection import (
    GRID,
    agreement,
    agreement_table,
    cross_validate,
    publish,
    within_budget,
)
from acla.search.loop import Found, Plan, Sets, run, search_sets, table, undecided
from acla.training import run_dir, validation

OUT = Path("runs/search")
PLAN = "plan.json"
KEPT_FLAGS = ("preset", "auto", "grid", "budget", "seeds")  # in the plan, for --resume


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = join(cli.pick_device(args.device))
    written = run_dir.open_run(args.out, PLAN, args.resume)
    if written is None:
        preset = cli.pick_preset(args.preset, processes.device)
        plan = plan_from_flags(args, preset)
        flags = {name: getattr(args, name) for name in KEPT_FLAGS}
        flags |= {"preset": preset, "seeds": args.seeds or 1}  # as --resume may repeat them
        cli.notice_sample(args)
    else:
        plan, flags = read_plan(written, args)
    processes.require_share(plan.search.batch_size)
    sets = search_sets(plan.search.train_set, args.data)
    processes.wait()  # none may find the plan that another writes
    if processes.first and written is None:
        args.out.mkdir(parents=True, exist_ok=True)
        begun = {"plan": dataclasses.asdict(plan), "flags": flags}
        write_atomically(args.out / PLAN, json.dumps(begun, indent=2).encode())
    tell(plan, sets, processes)
    found = search(plan, flags, sets, args, processes)
    console.say(table(found))
    if count := undecided(found):
        console.notice(
            f"{count} of {len(found.architecture.alpha)} gates are still undecided "
            "(chance between 0.1 and 0.9): a longer search, --steps, settles them"
        )
    files = " · ".join(str(args.out / name) for name in ("arch.json", "search.jsonl"))
    console.say(f"written: {files} · {args.out / 'model.safetensors'}")
    processes.leave()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_run_flags(parser, OUT, "search")
    group = parser.add_argument_group("Choosing λ, and several searches")
    group.add_argument(
        "--lambda",
        dest="lam",
        metavar="X|auto",
        type=parse_lambda,
        default=argparse.SUPPRESS,
        help="λ of Eq. 14, the weight of log cost, 0 or more; auto: by cross-validation on 20 %% "
        "of the training pictures (default: by --preset; paper: Table 9's)",
    )
    group.add_argument(
        "--grid",
        metavar="X,X…",
        type=parse_grid,
        help=f"values that --lambda auto tries (default: {','.join(map(str, GRID))})",
    )
    group.add_argument(
        "--budget",
        metavar="X",
        type=float,
        help="most multiply-adds that the attention found may add to a 48×48 picture, every key "
        "read; λ by bisection",
    )
    group.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        help="searches, from --seed on, and their agreement (default: 1)",
    )
    cli.add_flags(parser, SearchConfig, skip=("lam",))
    cli.add_flags(parser, config.ModelConfig, skip=("attention", "positions"))
    args = parser.parse_args(argv)
    args.auto = None
    if getattr(args, "lam", None) == "auto":
        del args.lam
        args.auto = True
    if args.grid and not (args.auto or args.resume):
        raise UsageError("--grid goes with --lambda auto")
    if args.auto and args.budget is not None:
        raise UsageError("--lambda auto and --budget both choose λ: give one of them")
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


def plan_from_flags(args: argparse.Namespace, preset: str) -> Plan:
    """The search that the flags describe; the preset's unless they say otherwise."""
    task = cli.task_from_flags(args) or Task()
    backbone = getattr(args, "backbone", "edsr")
    model = for_task(cli.override(config.model_preset(preset, task, backbone), args), task)
    cli.refuse_unused(args, model)
    how = config.search_preset(preset, task, backbone)
    return Plan(task, model, cli.override_length(how, args))


def read_plan(path: Path, args: argparse.Namespace) -> tuple[Plan, dict[str, Any]]:
    """The plan and the flags of the search to go on with. Raises CheckpointError, UsageError."""
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        flags = {name: begun["flags"][name] for name in KEPT_FLAGS}
        return run_dir.resumed_plan(Plan, begun, args, path), flags
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a plan of search.py: {error!r}") from error


def tell(plan: Plan, sets: Sets, processes: Processes) -> None:
    """What is about to happen, in one line."""
    how = plan.search
    console.notice(
        f"{plan.task}: {plan.model.backbone} of {plan.model.blocks} blocks × {plan.model.width}; "
        f"{how.steps} steps of {how.batch_size} patches of {how.patch_size}², the first "
        f"{how.first_stage} for the weights alone; {len(sets.weights)} pictures of "
        f"{how.train_set} for the weights, {len(sets.alpha)} for α; on {processes}"
    )
    console.notice(validation.validation_protocol(plan.task, plan.model.channels))


def search(
    plan: Plan,
    flags: dict[str, Any],
    sets: Sets,
    args: argparse.Namespace,
    processes: Processes,
) -> Found:
    """Choose λ where that is asked for, then search once or with several seeds."""
    out, notes = args.out, {}
    if flags["auto"]:
        grid = flags["grid"] or GRID
        lam, rows = cross_validate(plan, args.data, out / "trials", grid, processes)
        notes = {"cross_validation": rows}
        plan = dataclasses.replace(plan, search=dataclasses.replace(plan.search, lam=lam))
        for row in rows:
            console.say(
                f"λ {row['lambda']:<6g} {row['psnr']:.3f} dB, {row['lost']:.3f} ± "
                f"{row['lost_error']:.3f} below the best; {max(row['macs']) / 1e6:.1f} M "
                "multiply-adds"
            )
    console.notice(f"λ {plan.search.lam:g}" if flags["budget"] is None else "λ by bisection")
    seeds = range(plan.search.seed, plan.search.seed + (flags["seeds"] or 1))
    if len(seeds) == 1:
        return search_once(plan, flags, sets, out, processes, notes)
    found = []
    for seed in seeds:
        console.notice(f"seed {seed}")
        how = dataclasses.replace(plan.search, seed=seed)
        one = dataclasses.replace(plan, search=how)
        found.append(search_once(one, flags, sets, out / f"seed-{seed}", processes, notes))
    report = agreement(found)
    console.say(agreement_table(report))
    best = max(found, key=lambda one: one.mean_psnr)
    chosen = best.architecture.seed
    console.say(f"the best by PSNR, seed {chosen}:")
    return publish(best, out / f"seed-{chosen}", out, processes, {"agreement": report})


def search_once(
    plan: Plan,
    flags: dict[str, Any],
    sets: Sets,
    out: Path,
    processes: Processes,
    notes: dict[str, Any],
) -> Found:
    """One search, or the one that a budget allows."""
    if flags["budget"] is None:
        return run(plan, sets, out, processes, notes=notes)
    return within_budget(plan, sets, out / "trials", flags["budget"], processes, notes)


if __name__ == "__main__":
    cli.run(main)
