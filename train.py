"""Train a restoration network, plain or with attention at given, published or searched positions.

python train.py
    what runs/search/arch.json says, else JPEG artifacts at quality 10 with Table 9's positions
python train.py --task sr --scale 2 --data DIR --train-set DIV2K
python train.py --task sr --preset paper --describe
"""

import argparse
import hashlib
import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from acla import cli, config, console
from acla.config import AT_SEARCHED, ModelConfig, Task, TrainConfig
from acla.data import datasets
from acla.data.datasets import Loader, PatchSampler, Pictures, training_sets
from acla.distributed import Processes, join
from acla.errors import UsageError
from acla.files import clear_temporary, provenance
from acla.models.factory import describe
from acla.models.serialization import (
    fitting_weights,
    load_model,
    load_state,
    require_network,
    save_model,
    save_state,
)
from acla.search.architecture import choose_network, read_architecture
from acla.training import run_dir, validation
from acla.training.run_dir import Stop
from acla.training.trainer import Learner

SEARCHED = Path("runs/search/arch.json")
OUT = Path("runs/train")
MODEL, BEST, STATE = "model.safetensors", "best.safetensors", "state.safetensors"
LOG = "train.jsonl"


@dataclass(frozen=True)
class Plan:
    """Everything that decides how a run goes."""

    task: Task
    model: ModelConfig
    train: TrainConfig


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.log:
        run_dir.tensorboard()
    processes = join(cli.pick_device(args.device))
    state = None
    if not args.describe:
        state = run_dir.open_run(args.out, STATE, args.resume)
    if state is None:
        preset = cli.pick_preset(args.preset, processes.device)
        plan = plan_from_flags(args, preset)
        args.preset = preset  # as --resume may repeat it
        if args.describe:
            console.say(json.dumps(describe(plan.model)))
            return
        cli.tell_of_sample(args)
        train(plan, args, processes)
    else:
        tensors, progress = load_state(state)
        plan = run_dir.resumed_plan(Plan, progress, args, state)
        require_network(plan.model, tensors, state)
        train(plan, args, processes, tensors, progress)
    processes.leave()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_run_flags(parser, OUT, "run")
    parser.add_argument(
        "--arch",
        metavar="paper|none|FILE",
        help="where the attention stands: as the paper has it, nowhere, or a file of search.py "
        f"(default: {SEARCHED} if it is there, else paper)",
    )
    parser.add_argument(
        "--init-supernet",
        action="store_true",
        default=None,
        help="begin with the supernet's weights, the search's model.safetensors beside arch.json",
    )
    cli.add_alias(parser, "--inherit", "init_supernet", action="store_true")
    parser.add_argument(
        "--init",
        metavar="FILE",
        help="begin with the weights of a trained network of the same backbone; attention modules "
        "that it lacks are new, and change nothing at first (but for se and acla+se)",
    )
    parser.add_argument("--describe", action="store_true", help="print the network's size and stop")
    parser.add_argument(
        "--log",
        action="store_true",
        help="write the rows for TensorBoard too, to --out/tensorboard (extra `log`)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="threads that make patches ahead; they change no bit of the result (default: 0 on a "
        "CPU, up to 4 on a GPU)",
    )
    cli.add_flags(parser, TrainConfig)
    cli.add_flags(parser, ModelConfig)
    return parser.parse_args(argv)


def plan_from_flags(args: argparse.Namespace, preset: str) -> Plan:
    """The run that the flags describe; the searched architecture is the default where it fits
    them."""
    source = None
    if args.arch not in (None, "paper", "none"):
        source = read_architecture(Path(args.arch))
    elif args.arch is None and SEARCHED.is_file() and asks_for_searched(args):
        found, asked = read_architecture(SEARCHED), cli.task_from_flags(args)
        same_task = asked is None or asked.name == found.task.name
        if same_task and getattr(args, "backbone", found.model.backbone) == found.model.backbone:
            source = found
        taken = f"{SEARCHED} ({found.task})" if source else f"the paper's ({SEARCHED} does not fit)"
        console.notice(f"architecture: {taken}; --arch chooses another")
    if args.init_supernet and args.init:
        raise UsageError(
            "--init-supernet and --init both say which weights to begin with: give one"
        )
    if args.init_supernet and source is None:
        raise UsageError(
            "--init-supernet goes with a searched architecture: --arch FILE of search.py"
        )
    args.arch = args.arch or (str(SEARCHED) if source else "paper")  # as --resume may repeat it
    task, model = choose_network(args, preset, source)
    cli.refuse_unused(args, model)
    return Plan(task, model, cli.override_length(config.train_preset(preset), args))


def asks_for_searched(args: argparse.Namespace) -> bool:
    """Whether the flags leave the positions to a search: the rivals stand at even ones."""
    return "positions" not in args and getattr(args, "attention", "acla") in AT_SEARCHED


class Data(NamedTuple):
    """What a run reads: patches, and the pictures of every set to validate on, one set's after the
    other's; digests tell whether they are the same again."""

    sampler: PatchSampler
    loader: Loader
    validation: Pictures
    val_sets: dict[str, list[Path]]
    digests: dict[str, str]


def prepare(plan: Plan, args: argparse.Namespace, processes: Processes) -> Data:
    """The pictures of a run, those to validate on tried. Raises DataError, PictureError."""
    how, channels = plan.train, plan.model.channels
    paths, val_sets = training_sets(how.train_set, how.val_set or None, args.data)
    val_paths = list(itertools.chain(*val_sets.values()))
    share = how.batch_size, how.seed, processes.rank, processes.world
    sampler = PatchSampler(Pictures(paths), plan.task, how.patch_size, *share, channels=channels)
    return Data(
        sampler,
        Loader(sampler, processes.device, args.workers),
        validation.validation_set(val_paths, plan.task, channels),
        val_sets,
        {"train": datasets.digest(paths), "val": datasets.digest(val_paths)},
    )


def train(
    plan: Plan,
    args: argparse.Namespace,
    processes: Processes,
    tensors: dict[str, torch.Tensor] | None = None,
    progress: dict | None = None,
) -> None:
    """Run the plan to its end, from the start or from a state; at every validation write a row of
    the log, the model, the best one so far, and the state; the state alone where it is stopped.
    Raises Stopped."""
    how, out = plan.train, args.out
    processes.require_share(how.batch_size)
    data = prepare(plan, args, processes)
    learner, progress = take_up(plan, args, processes, data, tensors, progress)
    start, before = progress["step"], progress["seconds"]
    processes.wait()  # none may find the state that another writes
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        clear_temporary(out)
        log = run_dir.Log(out / LOG, start, out / "tensorboard" if args.log else None)
        if not start:
            write_state(out, learner, progress)
    tell(plan, data, processes)
    made, begun = provenance(processes.device), time.monotonic()
    bar = console.progress(
        range(start, how.steps), initial=start, total=how.steps, unit="step", desc="train"
    )
    with Stop(processes.world == 1) as stop:
        for step in bar:
            learner.step(step, data.sampler.indices, *data.loader.batch(step))
            done, asked = step + 1, stop.asked is not None
            row_ends = done % how.val_every == 0 or done == how.steps
            if not (row_ends or asked):
                continue
            seconds = round(before + time.monotonic() - begun, 2)
            kept = f"{out / STATE} of step {progress['step']}"
            if row_ends:
                row = row_of(learner, plan, data, done, kept) | {"seconds": seconds}
                shown = {"loss": f"{row['loss']:.3f}", "psnr": f"{row['val_psnr']:.2f}"}
                bar.set_postfix(shown, refresh=False)
                better = progress["best"] is None or row["val_psnr"] > progress["best"]["val_psnr"]
                best = {name: row[name] for name in ("step", "val_psnr")}
                progress |= row | ({"best": best} if better else {})
                if processes.first:
                    log.add(row)
                    info = {"train": asdict(how), "data": data.digests, **made, **row}
                    info["begun_with"] = progress.get("begun_with")
                    write(out, learner, plan, progress, info, better)
            else:
                losses = [loss.item() for loss in learner.losses]
                run_dir.require_finite_steps(losses, None, done, data.sampler, kept)
                progress |= {"step": done, "seconds": seconds}
                write_state(out, learner, progress)
            if asked and done < how.steps:
                raise stop.at(done, out / STATE)
    psnr, best = progress["val_psnr"], progress["best"]["step"]
    console.say(f"{plan.task}: {psnr:.2f} dB on the validation pictures after {how.steps} steps")
    console.say(f"written: {out / MODEL} · {out / BEST}, of step {best} · {out / LOG}")


def take_up(
    plan: Plan,
    args: argparse.Namespace,
    processes: Processes,
    data: Data,
    tensors: dict[str, torch.Tensor] | None,
    progress: dict | None,
) -> tuple[Learner, dict]:
    """The network as the run begins, or as its state left it, and the progress so far."""
    learner = Learner(plan.model, plan.train, processes)
    if progress:
        run_dir.require_same_data(progress, data.digests)
        learner.unpack(tensors, progress, args.out / STATE)
    else:
        given = {name: getattr(args, name) for name in ("preset", "arch", "init_supernet", "init")}
        progress = {"step": 0, "seconds": 0.0, "best": None, "flags": given, "data": data.digests}
        progress["begun_with"] = begin(learner, plan, args)
    return learner, progress | {"plan": asdict(plan)}


def row_of(
    learner: Learner, plan: Plan, data: Data, done: int, kept: str
) -> dict[str, int | float]:
    """The row of the log after `done` steps, but for their time: what they met, and the validation.
    Raises AclaError, which names `kept`, where one of them diverged."""
    losses, norms = learner.met()
    each = validation.each_psnr(learner.result, data.validation, plan.task, learner.device)
    found = validation.by_set(each, data.val_sets)
    run_dir.require_finite_steps(losses, found["val_psnr"], done, data.sampler, kept)
    row = {"step": done, "loss": sum(losses) / len(losses), "lr": learner.lr(done - 1)}
    return row | ({"norm": sum(norms) / len(norms)} if norms else {}) | found


def write(
    out: Path, learner: Learner, plan: Plan, progress: dict, info: dict, better: bool
) -> None:
    """Write the network, as the best so far too where it is, and last the state: a run killed in
    between goes on from the state before and writes the same once more."""
    for name in (MODEL, BEST) if better else (MODEL,):
        save_model(out / name, learner.result, plan.model, plan.task, info)
    write_state(out, learner, progress)


def write_state(out: Path, learner: Learner, progress: dict) -> None:
    tensors, values = learner.pack()
    save_state(out / STATE, tensors, {**progress, **values})


def begin(learner: Learner, plan: Plan, args: argparse.Namespace) -> dict[str, str] | None:
    """Take over the weights that the flags name: of the search, or of a trained network. Returns
    the file's name and digest, None without such flags. Raises UsageError, CheckpointError."""
    if args.init_supernet:
        path = Path(args.arch).parent / MODEL
        found = load_model(path)
        if found.config != plan.model:
            raise UsageError(
                f"--init-supernet: {path} holds another network than the flags ask for: leave out "
                "--preset, --attention, --positions and --keys, or --init-supernet"
            )
        weights, task = found.model.state_dict(), found.task
    elif args.init:
        path = Path(args.init)
        weights, task = fitting_weights(path, plan.model)
    else:
        return None
    learner.begin_with(weights)
    held = {name.split(".")[1] for name in weights if name.startswith("attention.")}
    new = tuple(p for p in plan.model.positions if str(p) not in held)
    told = f"; the attention behind {config.format_positions(new)} is new" if new else ""
    console.notice(f"weights: {path}, trained for {task}{told}")
    return {
        "file": f"{path.resolve().parent.name}/{path.name}",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def tell(plan: Plan, data: Data, processes: Processes) -> None:
    """What is about to happen, in one line, and how it is judged, in another."""
    size = describe(plan.model)
    where = config.format_positions(plan.model.positions)
    console.notice(
        f"{plan.task}: {plan.model.backbone} of {plan.model.blocks} blocks × {plan.model.width}, "
        f"{plan.model.attention} at {where} ({size['params']:,} parameters); "
        f"{plan.train.steps} steps of {plan.train.batch_size} patches of "
        f"{plan.train.patch_size}² from "
        f"{len(data.sampler.pictures)} pictures of {plan.train.train_set}, "
        f"{len(data.validation)} for validation; on {processes}"
    )
    console.notice(validation.validation_protocol(plan.task, plan.model.channels))


if __name__ == "__main__":
    cli.run(main)
