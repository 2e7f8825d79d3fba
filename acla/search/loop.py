"""One search: two stages of steps on a supernet, its log, and what it finds (Section 3.2)."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acla import config, console
from acla.config import ModelConfig, SearchConfig, Task
from acla.data import datasets
from acla.data.datasets import Loader, PatchSampler, Pictures, find_set, sample, split_for_search
from acla.distributed import Processes, means
from acla.files import provenance, write_atomically
from acla.models.cost import full_attention_flops
from acla.models.gumbel import draw_gates, expected_gates
from acla.models.serialization import load_state, save_model, save_state
from acla.search.architecture import Architecture
from acla.search.supernet import Supernet
from acla.training import run_dir, trainer, validation
from acla.training.run_dir import Stop

STATE = "supernet.safetensors"
WEIGHTS, ALPHA = 0, 1  # the streams of noise of the two kinds of step
SCORED = 16  # pictures, at most, that an epoch is scored on


@dataclass(frozen=True)
class Plan:
    """Everything that decides how a search goes."""

    task: Task
    model: ModelConfig
    search: SearchConfig


@dataclass(frozen=True)
class Sets:
    """Disjoint pictures: those the weights learn from, those α learns from, and those that score
    the derived network (α's, where no others are kept apart)."""

    weights: Sequence[Path]
    alpha: Sequence[Path]
    score: Sequence[Path] = ()

    def digests(self) -> dict[str, str]:
        """A fingerprint of each set."""
        return {name: datasets.digest(paths) for name, paths in vars(self).items() if paths}


@dataclass(frozen=True)
class Found:
    """A search's result: the architecture; PSNR in dB of the derived network, with the supernet's
    weights, on each picture that scores; keys kept by each module, a share."""

    architecture: Architecture
    psnr: tuple[float, ...]
    kept: dict[int, float] = field(default_factory=dict)

    @property
    def mean_psnr(self) -> float:
        return sum(self.psnr) / len(self.psnr)


def search_sets(name: str, root: Path | None) -> Sets:
    """The pictures of a set for the weights and for α: every fifth one is α's. Raises DataError."""
    if name == "sample":
        return Sets(sample("train"), sample("val"))
    return Sets(*split_for_search(find_set(name, root, "train")))


# The steps


class Search:
    """A supernet with its optimisers and patches. A step depends on the plan and its number alone,
    so that a search resumed from its state goes on to the bit."""

    def __init__(self, plan: Plan, sets: Sets, processes: Processes):
        self.plan, self.processes = plan, processes
        how = plan.search
        samplers = [
            PatchSampler(
                Pictures(paths),
                plan.task,
                how.patch_size,
                how.batch_size,
                2 * how.seed + stream,  # no seed of one kind of step is a seed of the other
                processes.rank,
                processes.world,
                channels=plan.model.channels,
            )
            for stream, paths in ((WEIGHTS, sets.weights), (ALPHA, sets.alpha))
        ]
        self.loaders = [Loader(sampler, processes.device) for sampler in samplers]
        torch.manual_seed(how.seed)
        self.net = Supernet(plan.model).to(processes.device).train()
        self.weights = trainer.adam(self.net.weights, how.lr)
        self.alpha = trainer.adam([self.net.alpha], how.alpha_lr)
        self.parts = {"supernet": self.net, "weights": self.weights, "alpha": self.alpha}

    def step(self, step: int) -> Tensor:
        """One step on the weights and, in the second stage, one on α. Returns the MSE on 0..255 and
        the loss [2] of the former."""
        seen = self.weight_step(step)
        if step >= self.plan.search.first_stage:
            self.alpha_step(step)
        return seen

    def weight_step(self, step: int) -> Tensor:
        """Descend ∇_w of Eq. 14 on training patches, with gates drawn and α as it is: modules whose
        gate is drawn 0 are not computed."""
        how, fixed = self.plan.search, self.net.alpha.detach()
        trainer.set_rate(self.weights, trainer.cosine(how.lr, step, how.steps))
        gates = self.draw(fixed, step, WEIGHTS)
        mse, cost = self.losses(step, WEIGHTS, gates, expected_gates(fixed))
        self.descend(self.weights, self.net.weights, mse + how.lam * cost.log())
        return torch.stack([mse.detach(), (mse + how.lam * cost.log()).detach()])

    def alpha_step(self, step: int) -> None:
        """Descend ∇_α of Eq. 14 on validation patches, with the weights as they are."""
        how = self.plan.search
        done, length = step - how.first_stage, how.steps - how.first_stage
        trainer.set_rate(self.alpha, trainer.cosine(how.alpha_lr, done, length))
        gates = self.draw(self.net.alpha, step, ALPHA)
        with self.net.weights_fixed():
            mse, cost = self.losses(step, ALPHA, gates, None)
            self.descend(self.alpha, [self.net.alpha], mse + how.lam * cost.log())

    def draw(self, alpha: Tensor, step: int, stream: int) -> Tensor:
        """The gates of a step, the same in every process."""
        seed = trainer.gate_seed(self.plan.search.seed, step, stream)
        return draw_gates(alpha, seed, temperature(self.plan.search, step))

    def losses(
        self, step: int, stream: int, gates: Tensor, expected: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """MSE on 0..255 of this process's patches, and the expected cost in FLOPs at the density
        that the masks of all processes met."""
        low, target, seeds = self.batch(step, stream)
        restored, kept = self.net(low, gates, seeds)
        counts = means(self.processes, [count.mean(0) for count in kept.values()])
        met = {j: count[None] for j, count in zip(kept, counts, strict=True)}
        mse = trainer.restoration_loss("mse", restored, target)
        return mse, self.net.cost(met, low.shape[2] * low.shape[3], expected)

    def descend(
        self, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], loss: Tensor
    ) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.mean_gradients(parameters)
        optimizer.step()

    def batch(self, step: int, stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """Degraded patches, their targets and the seeds of their masks: this process's share."""
        loader = self.loaders[stream]
        low, target = loader.batch(step)
        seeds = trainer.image_seeds(self.plan.search.seed, step, loader.sampler.indices, stream)
        return low, target, seeds.to(self.processes.device)


def temperature(how: SearchConfig, step: int) -> float:
    """τ of Eq. 10: constant while the weights train alone, then falling geometrically to its
    end."""
    share = max(0, step - how.first_stage) / max(1, how.steps - 1 - how.first_stage)
    return how.tau * (how.tau_end / how.tau) ** share


# The whole search


def run(
    plan: Plan,
    sets: Sets,
    out: Path,
    processes: Processes,
    first_stage: Path | None = None,
    notes: dict[str, Any] | None = None,
) -> Found:
    """Search from the start, or go on from the state in `out`. Writes the state and a row of
    search.jsonl after every epoch, and at the end arch.json, with `notes` among its evidence, and
    model.safetensors, the derived network with the supernet's weights.

    first_stage: a file that the state after the first stage is written to (and the rows until then
    beside it), or, where it is there already, begun from: searches that differ in λ alone share it.

    Raises DataError where the pictures are not those the state was made with, AclaError where the
    loss diverges, and, stopped, Stopped, with the state written."""
    how, log = plan.search, out / "search.jsonl"
    search = Search(plan, sets, processes)
    begun = resume(search, sets, out / STATE, first_stage)
    start, count = begun["step"], begun["count"]
    seen = torch.tensor(begun["seen"], device=processes.device)  # sums of MSE and loss
    scored = validation.validation_set(sets.score or sets.alpha, plan.task, plan.model.channels)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        if first_stage and start and not (out / STATE).is_file():
            shutil.copyfile(first_stage.with_suffix(".jsonl"), log)
        run_dir.drop_rows_after(log, start)
    since = time.monotonic() - begun["seconds"]
    steps = range(start, how.steps)
    bar = console.progress(steps, initial=start, total=how.steps, unit="step", desc="search")
    with Stop(processes.world == 1) as stop:
        for step in bar:
            seen += search.step(step)
            done, count, asked = step + 1, count + 1, stop.asked is not None
            epoch_ends = done % how.epoch_steps == 0 or done == how.steps
            shared = first_stage is not None and done == how.first_stage
            if not (epoch_ends or shared or asked):
                continue
            seen = processes.mean(seen)
            mse, loss = (seen / count).tolist()
            run_dir.require_finite(mse, done - count, done, out)
            seconds = round(time.monotonic() - since, 2)
            if epoch_ends:
                shown = {"mse": f"{mse:.1f}", "open": len(search.net.open_positions())}
                bar.set_postfix(shown, refresh=False)
                if processes.first:
                    row = epoch_row(search, scored, done, mse, loss) | {"seconds": seconds}
                    run_dir.append_row(log, row)
                seen, count = seen.zero_(), 0
            state = {"step": done, "plan": asdict(plan), "data": sets.digests()}
            state |= {"seconds": seconds, "seen": seen.tolist(), "count": count}
            if processes.first and shared:
                write_atomically(first_stage.with_suffix(".jsonl"), log.read_bytes())
                save_state(first_stage, trainer.pack(search.parts), state)
            if processes.first and (epoch_ends or asked):
                save_state(out / STATE, trainer.pack(search.parts), state)
            if asked and done < how.steps:
                raise stop.at(done, out / STATE)
    return derive(search, sets, scored, out, notes or {})


def resume(search: Search, sets: Sets, *states: Path | None) -> dict[str, Any]:
    """Take over the first of the states that is there. Returns its step, seconds, and the sums and
    the number of the steps since the last row."""
    begun = {"step": 0, "seconds": 0.0, "seen": [0.0, 0.0], "count": 0}
    path = next((path for path in states if path and path.is_file()), None)
    if path is None:
        return begun
    tensors, progress = load_state(path)
    run_dir.require_same_data(progress, sets.digests())
    trainer.unpack(search.parts, tensors, path)
    return begun | progress


def epoch_row(
    search: Search, scored: Pictures, done: int, mse: float, loss: float
) -> dict[str, Any]:
    """The row of the log after `done` steps, but for their time: the losses, the gates, and the
    PSNR in dB of the network derived now, on a few pictures."""
    net, task = search.net.derive(), search.plan.task
    psnr = validation.each_psnr(net, scored, task, search.processes.device, SCORED)
    row = {"epoch": -(-done // search.plan.search.epoch_steps), "step": done}
    row |= {"mse": mse, "loss": loss, **gate_report(search, done - 1)}
    return row | {"val_psnr": sum(psnr) / len(psnr)}


def gate_report(search: Search, step: int) -> dict[str, Any]:
    """The search's state for its log: τ; α, the gates' probabilities σ(α) and which are open
    without noise; the expected cost in FLOPs; the share of keys kept, in all and by position."""
    net, how = search.net, search.plan.search
    with torch.no_grad():
        chance = expected_gates(net.alpha)
        cost = net.cost({}, how.patch_size**2)
    layers = torch.arange(1, len(chance) + 1, device=chance.device)
    density = net.density.tril().sum(1)
    return {
        "tau": temperature(how, step),
        "alpha": net.alpha.tolist(),
        "gates": chance.tolist(),
        "open": net.open_positions(),
        "cost": cost.item(),
        "kept": (density.sum() / layers.sum()).item(),
        "density": (density / layers).tolist(),
    }


def derive(search: Search, sets: Sets, scored: Pictures, out: Path, notes: dict[str, Any]) -> Found:
    """Derive the network, measure its cost on α's patches of one step, write what was found."""
    plan, net, device = search.plan, search.net, search.processes.device
    how, n = plan.search, plan.search.patch_size**2
    positions = net.open_positions()
    low, _, _ = search.batch(how.steps, ALPHA)
    net.eval()
    with torch.no_grad():
        gates = draw_gates(net.alpha, None, 1.0)
        _, kept = net(low, gates)
        counts = means(search.processes, [count.mean(0) for count in kept.values()])
        met = {j: count[None] for j, count in zip(kept, counts, strict=True)}
        cost = net.cost(met, n, gates).item()
    derived = net.derive(positions)
    psnr = validation.each_psnr(derived, scored, plan.task, device)
    evidence = {
        **provenance(device),
        "processes": search.processes.world,
        "pictures": {name: len(paths) for name, paths in vars(sets).items() if paths},
        "data": sets.digests(),
        "search": asdict(how),
        "val_psnr": sum(psnr) / len(psnr),
        **notes,
    }
    alpha = tuple(net.alpha.tolist())
    architecture = Architecture(
        plan.task, derived.config, how.lam, how.seed, alpha, cost, how.patch_size, evidence
    )
    if search.processes.first:
        save_model(out / "model.safetensors", derived, derived.config, plan.task, evidence)
        write_atomically(out / "arch.json", architecture.to_json().encode())
    shares = {j: count.mean().item() / (n * plan.model.keys) for j, count in met.items()}
    return Found(architecture, tuple(psnr), shares)


def table(found: Found) -> str:
    """The positions, one a line, and what they cost beside a module behind every block."""
    architecture = found.architecture
    model, n = architecture.model, architecture.patch**2
    dense = full_attention_flops(model.blocks, n, model.width, model.keys, masked=True)
    lines = ["position   alpha  chance  keys kept  module"]
    for j, alpha in enumerate(architecture.alpha, 1):
        chance = torch.tensor(alpha).sigmoid().item()
        kept = f"{found.kept[j]:9.1%}" if j in found.kept else "        –"
        shown = "open" if j in model.positions else "–"
        lines.append(f"{j:8d}  {alpha:+.3f}  {chance:6.2f}  {kept}  {shown}")
    lines += [
        f"positions: {config.format_positions(model.positions)}",
        f"attention costs {architecture.cost / 2e6:.1f} M multiply-adds for "
        f"{architecture.patch}×{architecture.patch} pixels, {1 - architecture.cost / dense:.1%} "
        f"less than a module behind every block ({dense / 2e6:.1f} M)",
        f"{architecture.task}: {found.mean_psnr:.2f} dB on the validation pictures with the "
        "supernet's weights",
    ]
    return "\n".join(lines)


def undecided(found: Found) -> int:
    """How many gates are neither open nor shut for certain: a chance between 0.1 and 0.9."""
    return int((torch.tensor(found.architecture.alpha).sigmoid() - 0.5).abs().lt(0.4).sum())
