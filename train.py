"""Train a restoration network, plain or with attention at given, published or searched positions.

python train.py
    as runs/search/arch.json says, else JPEG artifacts at quality 10 with Table 9's positions
python train.py --task sr --scale 2 --data DIR --train-set DIV2K
python train.py --task sr --preset paper --describe
"""

import argparse
import functools
import hashlib
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from acla import cli, config, console
from acla.config import ATTENTIONS, ModelConfig, TrainConfig
from acla.data import datasets
from acla.data.datasets import Loader, PatchSampler, Pictures, training_sets
from acla.distributed import Processes, join
from acla.errors import UsageError
from acla.models.factory import describe
from acla.models.serialization import compatible_weights, load_model, load_state
from acla.restore.inference import keep_memory
from acla.search.architecture import Architecture, choose_network, read_architecture
from acla.training import run_dir, validation
from acla.training.run_dir import BEST, LOG, MODEL, STATE, Progress, RunDir, Stop, TrainPlan
from acla.training.trainer import Trainer

SEARCHED = Path("runs/search/arch.json")
OUT = Path("runs/train")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.log:
        run_dir.tensorboard()
    processes = join(cli.pick_device(args.device))
    keep_memory(processes.device)
    path = None if args.describe else run_dir.open_run(args.out, STATE, args.resume)
    if path:
        tensors, values = load_state(path)
        plan = run_dir.resumed_plan(TrainPlan, values, args, path)
        train(plan, args, processes, tensors, values)
    else:
        plan = plan_from_flags(args, cli.pick_preset(args.preset, processes.device))
        if args.describe:
            console.say(json.dumps(describe(plan.model)))
            return
        cli.notice_sample(args)
        train(plan, args, processes)
    processes.leave()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser(None, __doc__)
    cli.add_run_flags(parser, OUT, "run")
    add = parser.add_argument
    text = "positions of the attention: the paper's, none, or those in a file of search.py "
    text += f"(default: {SEARCHED} if it exists, else paper)"
    add("--arch", metavar="paper|none|FILE", help=text)
    text = "of a front in --arch FILE, the best network of at most X multiply-adds of attention "
    text += "for a 48×48 picture (default: the search's choice)"
    add("--budget", type=float, metavar="X", help=text)
    text = "begin with the supernet's weights, the search's model.safetensors beside arch.json"
    add("--init-supernet", action="store_true", default=None, help=text)
    cli.add_alias(parser, "--inherit", "init_supernet", action="store_true")
    text = "begin with the weights of a trained network of the same backbone; attention modules "
    text += "that it lacks are new, and change nothing at first (except se and acla+se)"
    add("--init", metavar="FILE", help=text)
    text = "print the network's size and stop"
    add("--describe", action="store_true", default=None, help=text)
    text = "write the log for TensorBoard too, to --out/tensorboard (extra `log`)"
    add("--log", action="store_true", help=text)
    text = "processes that prepare patches ahead; they change no bit of the result (default: 0 "
    text += "on a CPU, up to 4 on a GPU)"
    add("--workers", type=int, help=text)
    cli.add_flags(parser, TrainConfig)
    cli.add_flags(parser, ModelConfig)
    return parser.parse_args(argv)


# Configuration


def plan_from_flags(args: argparse.Namespace, preset: str) -> TrainPlan:
    """The run that the flags describe. Raises UsageError."""
    if args.init_supernet and args.init:
        raise UsageError("--init-supernet and --init both name the initial weights: give one")
    source = choose_architecture(args)
    if args.budget is not None:
        if source is None:
            raise UsageError("--budget goes with a front: --arch FILE of search.py --method front")
        source = source.within(args.budget)
    if args.init_supernet and source is None:
        raise UsageError(
            "--init-supernet goes with a searched architecture: --arch FILE of search.py"
        )
    task, model = choose_network(args, preset, source)
    cli.refuse_unused(args, model)
    return TrainPlan(task, model, cli.override_length(config.train_preset(preset), args))


def choose_architecture(args: argparse.Namespace) -> Architecture | None:
    """The searched architecture: of --arch FILE, else the last search's if it fits the flags."""
    if args.arch:
        return None if args.arch in ("paper", "none") else read_architecture(Path(args.arch))
    kind = ATTENTIONS[getattr(args, "attention", "acla")]
    by_search = kind.at_searched and "positions" not in args
    if not (by_search and SEARCHED.is_file()):
        return None
    searched, task = read_architecture(SEARCHED), cli.task_from_flags(args)
    backbone = searched.model.backbone
    fits = task is None or task.name == searched.task.name
    fits = fits and getattr(args, "backbone", backbone) == backbone
    chosen = f"{SEARCHED} ({searched.task})" if fits else f"the paper's ({SEARCHED} does not fit)"
    console.notice(f"architecture: {chosen}; --arch chooses another")
    return searched if fits else None


# Data


class Data(NamedTuple):
    """Patches, the pictures to validate on, of all sets in a row, and fingerprints of both."""

    sampler: PatchSampler
    loader: Loader
    validation: Pictures
    val_sets: dict[str, list[Path]]
    digests: dict[str, str]


def load_data(plan: TrainPlan, args: argparse.Namespace, processes: Processes) -> Data:
    """The pictures of a run, those to validate on tried. Raises DataError, PictureError."""
    config, channels = plan.train, plan.model.channels
    paths, val_sets = training_sets(config.train_set, config.val_set or None, args.data)
    val_paths = list(itertools.chain(*val_sets.values()))
    share = config.batch_size, config.seed, processes.rank, processes.world
    sampler = PatchSampler(Pictures(paths), plan.task, config.patch_size, *share, channels=channels)
    return Data(
        sampler,
        Loader(sampler, processes.device, args.workers),
        validation.validation_set(val_paths, plan.task, channels),
        val_sets,
        {"train": datasets.fingerprint(paths), "val": datasets.fingerprint(val_paths)},
    )


# Training


def train(
    plan: TrainPlan,
    args: argparse.Namespace,
    processes: Processes,
    tensors: dict[str, Tensor] | None = None,
    values: dict[str, Any] | None = None,
) -> None:
    """Train from the start, or from a state's tensors and values, to the plan's last step. Raises
    Stopped after a signal, with the state written."""
    steps, val_every = plan.train.steps, plan.train.val_every
    processes.require_share(plan.train.batch_size)
    data = load_data(plan, args, processes)
    trainer, progress = restore_or_init(plan, args, processes, data, tensors, values)
    processes.wait()  # none may find the state that another writes
    run = RunDir(args.out, plan, progress, processes, data.sampler, curves=args.log)
    if not progress.step:
        run.write(trainer, 0)
    log_plan(plan, data, processes)
    bar = console.progress(
        range(progress.step, steps), initial=progress.step, total=steps, unit="step", desc="train"
    )
    with Stop(processes.world == 1) as stop:
        for step in bar:
            trainer.step(step, data.sampler.indices, *data.loader.batch(step))
            done, asked = step + 1, stop.asked
            if done % val_every == 0 or done == steps:
                psnr = validate(trainer, plan, data)
                bar.set_postfix(psnr=f"{psnr['val_psnr']:.2f}", refresh=False)
                run.write(trainer, done, psnr)
            elif asked:
                run.write(trainer, done)
            if asked and done < steps:
                raise stop.at(done, args.out / STATE)
    psnr, best = progress.val_psnr, progress.best["step"]
    console.say(f"{plan.task}: {psnr:.2f} dB on the validation pictures after {steps} steps")
    files = f"{args.out / MODEL} · {args.out / BEST}, of step {best} · {args.out / LOG}"
    console.say(f"written: {files}")


def restore_or_init(
    plan: TrainPlan,
    args: argparse.Namespace,
    processes: Processes,
    data: Data,
    tensors: dict[str, Tensor] | None,
    values: dict[str, Any] | None,
) -> tuple[Trainer, Progress]:
    """The network as its state left it or as the run begins, and the progress so far."""
    trainer = Trainer(plan.model, plan.train, processes)
    if values is None:
        begun_with = load_initial_weights(trainer, plan, args)
        return trainer, Progress(asdict(plan), data.digests, begun_with=begun_with)
    path = args.out / STATE
    progress = Progress.from_state(values | {"plan": asdict(plan)}, path)
    run_dir.require_same_data(values, data.digests)
    trainer.load_state(tensors, values, path)
    return trainer, progress


def load_initial_weights(
    trainer: Trainer, plan: TrainPlan, args: argparse.Namespace
) -> dict[str, str] | None:
    """Load the weights that the flags name: a search's, or a trained network's. Returns the file's
    name and digest, None without such flags. Raises UsageError, CheckpointError."""
    if args.init_supernet:
        path = Path(args.arch or SEARCHED).parent / MODEL
        supernet = load_model(path)
        if supernet.config != plan.model:
            raise UsageError(
                f"--init-supernet: {path} holds another network than the flags ask for: leave out "
                "--preset, --attention, --positions, --keys and --budget, or --init-supernet"
            )
        weights, task = supernet.model.state_dict(), supernet.task
    elif args.init:
        path = Path(args.init)
        weights, task = compatible_weights(path, plan.model)
    else:
        return None
    trainer.load_weights(weights)
    loaded = {name.split(".")[1] for name in weights if name.startswith("attention.")}
    new = tuple(p for p in plan.model.positions if str(p) not in loaded)
    without = f"; the attention behind {config.format_positions(new)} is new" if new else ""
    console.notice(f"weights: {path}, trained for {task}{without}")
    return {
        "file": f"{path.resolve().parent.name}/{path.name}",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def validate(trainer: Trainer, plan: TrainPlan, data: Data) -> dict[str, float]:
    """PSNR in dB: val_psnr over all pictures, and of several sets val_psnr_NAME each."""
    psnr = validation.each_psnr(trainer.result, data.validation, plan.task, trainer.device)
    return validation.by_set(psnr, data.val_sets)


def log_plan(plan: TrainPlan, data: Data, processes: Processes) -> None:
    """One line for what is trained, one for how it is judged."""
    size = describe(plan.model)
    positions = config.format_positions(plan.model.positions)
    console.notice(
        f"{plan.task}: {plan.model.backbone} of {plan.model.blocks} blocks × {plan.model.width}, "
        f"{plan.model.attention} at {positions} ({size['params']:,} parameters); "
        f"{plan.train.steps} steps of {plan.train.batch_size} patches of {plan.train.patch_size}² "
        f"from {len(data.sampler.pictures)} pictures of {plan.train.train_set}, "
        f"{len(data.validation)} for validation; on {processes}"
    )
    console.notice(validation.validation_protocol(plan.task, plan.model.channels))


command = functools.partial(cli.run, main)  # acla-train

if __name__ == "__main__":
    command()
