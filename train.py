"""Train a restoration network, plain or with attention at given, published or searched positions.

python train.py
    what runs/search/arch.json says, else JPEG artifacts at quality 10 with Table 9's positions
python train.py --task sr --scale 2 --data DIR --train-set DIV2K
python train.py --task sr --preset paper --describe
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from acla import cli, config, training
from acla.architecture import choose_network, read_architecture
from acla.backbone import Backbone, describe
from acla.checkpoint import load_model, load_state, save_model, save_state
from acla.config import ModelConfig, Task, TrainConfig
from acla.data import PatchSampler, Pictures, training_sets
from acla.errors import UsageError
from acla.processes import Processes, join
from acla.provenance import provenance

SEARCHED = Path("runs/search/arch.json")
OUT = Path("runs/train")
MODEL, STATE = "model.safetensors", "state.safetensors"


@dataclass(frozen=True)
class Plan:
    """Everything that decides how a run goes."""

    task: Task
    model: ModelConfig
    train: TrainConfig


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = join(cli.pick_device(args.device))
    state = None
    if not args.describe:
        state = training.open_run(args.out, STATE, args.resume)
    if state is None:
        plan = plan_from_flags(args, cli.pick_preset(args.preset, processes.device))
        if args.describe:
            cli.say(json.dumps(describe(plan.model)))
            return
        cli.tell_of_sample(args)
        train(plan, args, processes)
    else:
        tensors, progress = load_state(state)
        plan = training.resumed_plan(Plan, progress, args)
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
        help="where the attention stands: Table 9, nowhere, or a file of search.py "
        f"(default: {SEARCHED} if it is there, else paper)",
    )
    parser.add_argument(
        "--inherit",
        action="store_true",
        default=None,
        help="begin with the supernet's weights, the search's model.safetensors beside arch.json",
    )
    parser.add_argument("--describe", action="store_true", help="print the network's size and stop")
    config.add_flags(parser, TrainConfig)
    config.add_flags(parser, ModelConfig)
    return parser.parse_args(argv)


def plan_from_flags(args: argparse.Namespace, preset: str) -> Plan:
    """The run that the flags describe; the searched architecture is the default where it fits
    them."""
    source = None
    if args.arch not in (None, "paper", "none"):
        source = read_architecture(Path(args.arch))
    elif args.arch is None and SEARCHED.is_file() and "positions" not in args:
        found, asked = read_architecture(SEARCHED), config.task_from_flags(args)
        same_task = asked is None or asked.name == found.task.name
        if same_task and getattr(args, "backbone", found.model.backbone) == found.model.backbone:
            source = found
        taken = f"{SEARCHED} ({found.task})" if source else f"Table 9's ({SEARCHED} does not fit)"
        cli.notice(f"architecture: {taken}; --arch chooses another")
    if args.inherit and source is None:
        raise UsageError("--inherit goes with a searched architecture: --arch FILE of search.py")
    task, model = choose_network(args, preset, source)
    return Plan(task, model, config.override_length(config.train_preset(preset), args))


def train(
    plan: Plan,
    args: argparse.Namespace,
    processes: Processes,
    tensors: dict[str, torch.Tensor] | None = None,
    progress: dict | None = None,
) -> None:
    """Run the plan to its end, from the start or from a state; at every validation write the model,
    the state and a row of the log."""
    how, out, log = plan.train, args.out, args.out / "train.jsonl"
    processes.require_share(how.batch)
    flags = {name: getattr(args, name) for name in ("preset", "arch", "inherit")}
    flags = progress["flags"] if progress else flags
    paths, val_paths = training_sets(how.train_set, how.val_set or None, args.data)
    data = {"train": training.digest(paths), "val": training.digest(val_paths)}
    channels = plan.model.channels
    share = how.batch, how.seed, processes.rank, processes.world
    sampler = PatchSampler(Pictures(paths), plan.task, how.patch, *share, channels=channels)
    validation = training.validation_set(val_paths, plan.task, channels)
    run = Run(plan, processes)
    start, seconds = 0, 0.0
    if progress:
        training.require_same_data(progress, data)
        training.unpack(run.parts, tensors, out / STATE)
        start, seconds = progress["step"], progress["seconds"]
    elif args.inherit:
        run.begin_with(inherited(args, plan))
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        training.drop_rows_after(log, start)
    several = f", {processes.world} processes" if processes.world > 1 else ""
    cli.notice(
        f"{plan.task}: {describe_run(plan, len(paths), len(val_paths))}; "
        f"on {processes.device}{several}"
    )

    total, count, begun = torch.zeros((), device=processes.device), 0, time.monotonic()
    row, made = progress or {}, provenance(processes.device)
    bar = cli.progress(
        range(start, how.steps), initial=start, total=how.steps, unit="step", desc="train"
    )
    for step in bar:
        total += run.step(sampler, step)
        done, count = step + 1, count + 1
        if done % how.validate and done < how.steps:
            continue
        loss = processes.mean(total).item() / count
        psnr = training.mean_psnr(run.result, validation, plan.task, processes.device)
        training.require_finite(loss, done - count, done, out, psnr)
        bar.set_postfix(refresh=False, loss=f"{loss:.3f}", psnr=f"{psnr:.2f}")
        row = {
            "step": done,
            "loss": loss,
            "rate": run.rate(step),
            "val_psnr": psnr,
            "seconds": round(seconds + time.monotonic() - begun, 2),
        }
        total, count = total.zero_(), 0
        if not processes.first:
            continue
        training.append_row(log, row)
        info = {"train": asdict(how), "data": data, **made, **row}
        save_model(out / MODEL, run.result, plan.model, plan.task, info)
        state = {**row, "plan": asdict(plan), "data": data, "flags": flags}
        save_state(out / STATE, training.pack(run.parts), state)
    psnr = row["val_psnr"]
    cli.say(f"{plan.task}: {psnr:.2f} dB on the validation pictures after {how.steps} steps")
    cli.say(f"written: {out / MODEL} · {log}")


class Run:
    """The network, its optimiser and its averages, and one step of them."""

    def __init__(self, plan: Plan, processes: Processes):
        self.plan, self.processes, self.device = plan, processes, processes.device
        torch.manual_seed(plan.train.seed)
        self.model = Backbone(plan.model).to(self.device).train()
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = training.adam(learning, plan.train.rate)
        self.averaged = None
        if plan.train.ema:
            self.averaged = AveragedModel(self.model, avg_fn=training.moving_average)
        self.parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "averaged": self.averaged,
        }

    def begin_with(self, weights: Backbone) -> None:
        """Take over a network's weights, into the averages too."""
        self.model.load_state_dict(weights.state_dict())
        if self.averaged:
            self.averaged.module.load_state_dict(weights.state_dict())

    @property
    def result(self) -> Backbone:
        """The network to validate and to write: the averages where they are kept."""
        return self.averaged.module if self.averaged else self.model

    def rate(self, step: int) -> float:
        return training.halved(self.plan.train.rate, step, self.plan.train.halve)

    def step(self, sampler: PatchSampler, step: int) -> torch.Tensor:
        """One optimiser step on the patches of `step`; returns the loss, a scalar on the device."""
        how = self.plan.train
        low, target = (batch.to(self.device) for batch in sampler.batch(step))
        seeds = training.image_seeds(how.seed, step, sampler.indices).to(self.device)
        training.set_rate(self.optimizer, self.rate(step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=how.amp):
            restored = self.model(low, seeds)
        loss = training.restoration_loss(how.loss, restored, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.mean_gradients(self.model.parameters())
        self.optimizer.step()
        if self.averaged:
            self.averaged.update_parameters(self.model)
        return loss.detach()


def inherited(args: argparse.Namespace, plan: Plan) -> Backbone:
    """The network that the search derived, with the supernet's weights, from beside arch.json.
    Raises UsageError where it is another network than the plan's."""
    path = (SEARCHED if args.arch is None else Path(args.arch)).parent / MODEL
    found = load_model(path)
    if found.config != plan.model:
        raise UsageError(
            f"--inherit: {path} holds another network than the flags ask for: leave out "
            "--preset, --attention, --positions and --keys, or --inherit"
        )
    cli.notice(f"weights: {path}")
    return found.model


def describe_run(plan: Plan, pictures: int, val_pictures: int) -> str:
    """The run in one line, for the notice at its start."""
    size = describe(plan.model)
    where = config.format_positions(plan.model.positions)
    return (
        f"{plan.model.backbone} of {plan.model.blocks} blocks × {plan.model.width}, "
        f"{plan.model.attention} at {where} ({size['params']:,} parameters); "
        f"{plan.train.steps} steps of {plan.train.batch} patches of {plan.train.patch}² from "
        f"{pictures} pictures of {plan.train.train_set}, {val_pictures} for validation"
    )


if __name__ == "__main__":
    cli.run(main)
