"""One search: two stages of steps on a supernet, its log and its result (Section 3.2)."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from acla import console
from acla.config import ModelConfig, SearchConfig, Task
from acla.data import datasets
from acla.data.datasets import Loader, PatchSampler, Pictures, find_set, sample_set, split_every
from acla.distributed import Processes, means
from acla.files import provenance, write_atomically
from acla.models.backbones import Backbone
from acla.models.gumbel import draw_gates, expected_gates
from acla.models.serialization import load_state, save_model, save_state
from acla.search.architecture import Architecture
from acla.search.front import AT_ONCE, PATCHES, Pairs, fair_gates, search_front
from acla.search.result import MAX_SCORED, SearchResult
from acla.search.supernet import Supernet
from acla.training import run_dir, trainer, validation
from acla.training.run_dir import RunFiles, Stop

STATE, LOG, ARCHITECTURE = "supernet.safetensors", "search.jsonl", "arch.json"
WEIGHTS, ALPHA = 0, 1  # the streams of noise of the two kinds of step


@dataclass(frozen=True)
class SearchPlan:
    """Everything that decides a search."""

    task: Task
    model: ModelConfig
    search: SearchConfig

    def change(self, **fields: Any) -> Self:
        """The plan with other values of its `search`."""
        return replace(self, search=replace(self.search, **fields))


@dataclass(frozen=True)
class Sets:
    """Disjoint pictures: for the weights, for α, to score the derived network (else α's)."""

    weights: Sequence[Path]
    alpha: Sequence[Path]
    score: Sequence[Path] = ()


def search_sets(name: str, root: Path | None) -> Sets:
    """The pictures of a set, every fifth one for α. Raises DataError."""
    if name == "sample":
        return Sets(sample_set("train"), sample_set("val"))
    return Sets(*split_every(find_set(name, root, "train"), 5))


# The steps


class Search:
    """A supernet with its optimisers and patches. A step depends on the plan and its number alone:
    a search resumed from its state is equal to the bit."""

    def __init__(self, plan: SearchPlan, sets: Sets, processes: Processes):
        self.plan, self.config, self.processes = plan, plan.search, processes
        self.loaders = [self.loader(sets.weights, WEIGHTS), self.loader(sets.alpha, ALPHA)]
        torch.manual_seed(self.config.seed)
        self.net = Supernet(plan.model).to(processes.device).train()
        self.weights = trainer.adam(self.net.weights, self.config.lr)
        self.alpha = trainer.adam([self.net.alpha], self.config.alpha_lr)
        self.parts = {"supernet": self.net, "weights": self.weights, "alpha": self.alpha}

    def loader(self, paths: Sequence[Path], stream: int) -> Loader:
        """The patches of one kind of step, with seeds that the other kind never has."""
        config, processes, plan = self.config, self.processes, self.plan
        patches = config.patch_size, config.batch_size, 2 * config.seed + stream
        share, channels = (processes.rank, processes.world), plan.model.channels
        sampler = PatchSampler(Pictures(paths), plan.task, *patches, *share, channels=channels)
        return Loader(sampler, processes.device)

    def step(self, step: int) -> Tensor:
        """A step on the weights and, in the second stage, one on α. Returns the MSE on 0..255 and
        the loss [2] of the weights' step."""
        losses = self.weight_step(step)
        if step >= self.config.first_stage:
            self.alpha_step(step)
        return losses

    def weight_step(self, step: int) -> Tensor:
        """Descend ∇_w of Eq. 14 on training patches, with gates drawn and α fixed: modules whose
        gate is drawn 0 are not computed."""
        config, alpha = self.config, self.alpha_at(step).detach()
        trainer.set_rate(self.weights, trainer.cosine(config.lr, step, config.steps))
        gates = self.draw(alpha, step, WEIGHTS)
        mse, cost = self.mse_and_cost(step, WEIGHTS, gates, expected_gates(alpha))
        loss = mse + config.lam * cost.log()
        self.descend(self.weights, self.net.weights, loss)
        return torch.stack([mse.detach(), loss.detach()])

    def alpha_step(self, step: int) -> None:
        """Descend ∇_α of Eq. 14 on validation patches, with the weights fixed."""
        config, first = self.config, self.config.first_stage
        rate = trainer.cosine(config.alpha_lr, step - first, config.steps - first)
        trainer.set_rate(self.alpha, rate)
        with self.net.weights_fixed():
            losses, alpha = [], self.alpha_at(step)
            for draw in range(config.draws):
                gates = self.draw(alpha, step, ALPHA, draw)
                mse, cost = self.mse_and_cost(step, ALPHA, gates, expected_gates(alpha))
                losses.append(mse + config.lam * cost.log())
            self.descend(self.alpha, [self.net.alpha], sum(losses) / len(losses))

    def alpha_at(self, step: int) -> Tensor:
        """α over the share of the noise that is left: as gates with less noise see it."""
        return self.net.alpha / at(self.config, step, 1.0, self.config.gate_noise_end)

    def draw(self, alpha: Tensor, step: int, stream: int, draw: int = 0) -> Tensor:
        """The gates of a step, the same in every process: its first draw, or another one."""
        if self.config.method == "front":
            return fair_gates(len(alpha), self.config.seed, step, alpha.device)
        seed = trainer.gate_seed(self.config.seed, step, stream + draw // 2 * 2)
        return draw_gates(alpha, seed, temperature(self.config, step), opposite=draw % 2 == 1)

    def mse_and_cost(
        self, step: int, stream: int, gates: Tensor, expected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This process's MSE on 0..255, and the expected cost in FLOPs at all masks' density."""
        low, target, seeds = self.batch(step, stream)
        restored, kept = self.net(low, gates, seeds if self.config.mask_noise else None)
        mse = trainer.restoration_loss("mse", restored, target)
        return mse, self.net.cost(self.mean_counts(kept), low.shape[2] * low.shape[3], expected)

    def mean_counts(self, kept: dict[int, Tensor]) -> dict[int, Tensor]:
        """The keys kept in each module, {position: [1,L]}, averaged over all processes' patches."""
        counts = means(self.processes, [count.mean(0) for count in kept.values()])
        return {position: count[None] for position, count in zip(kept, counts, strict=True)}

    def descend(
        self, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], loss: Tensor
    ) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.mean_gradients(parameters)
        optimizer.step()

    def batch(self, step: int, stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's degraded patches [B,C,h,w], targets [B,C,H,W] and masks' seeds [B]."""
        loader = self.loaders[stream]
        low, target = loader.batch(step)
        of_step = self.config.seed, step, loader.sampler.indices, stream
        return low, target, trainer.image_seeds(*of_step, self.processes.device)

    def positions(self) -> tuple[int, ...]:
        """Those of the network derived now: of open gates; while a front is trained, all."""
        if self.config.method == "front":
            return self.net.config.positions
        return self.net.open_positions()


def temperature(config: SearchConfig, step: int) -> float:
    """τ of Eq. 10."""
    return at(config, step, config.tau, config.tau_end)


def at(config: SearchConfig, step: int, first: float, last: float) -> float:
    """A value that is constant in the first stage, then changes geometrically."""
    share = max(0, step - config.first_stage) / max(1, config.steps - 1 - config.first_stage)
    return first * (last / first) ** share


# The files of a search


class SearchDir(RunFiles):
    """The files of a search: the state and a row of search.jsonl after every epoch. Begins with the
    state in `folder`, else with that in `first_stage`, else anew.

    first_stage: file for the state after the first stage, beside it the rows until then. Raises
    DataError where the pictures are not those of the state."""

    def __init__(self, search: Search, sets: Sets, folder: Path, first_stage: Path | None):
        self.search, self.first_stage, self.state = search, first_stage, folder / STATE
        task, channels = search.plan.task, search.plan.model.channels
        self.scored = validation.validation_set(sets.score or sets.alpha, task, channels)
        self.digests = {
            name: datasets.fingerprint(paths) for name, paths in vars(sets).items() if paths
        }
        progress = {"step": 0, "seconds": 0.0, "seen": [0.0, 0.0], "count": 0}
        state = next((p for p in (self.state, first_stage) if p and p.is_file()), None)
        if state:
            tensors, values = load_state(state)
            run_dir.require_same_data(values, self.digests)
            trainer.load_state_tensors(search.parts, tensors, state)
            progress |= values
        self.step, self.count = progress["step"], progress["count"]
        # Of MSE and loss since the last row; on the device: reading them would wait for it.
        self.sums = torch.tensor(progress["seen"], device=search.processes.device)
        super().__init__(folder, LOG, self.step, progress["seconds"], search.processes.first)
        if self.writes and state and state == first_stage:
            shutil.copyfile(first_stage.with_suffix(".jsonl"), self.log)

    @property
    def epoch_ends(self) -> bool:
        config = self.search.config
        return self.step % config.epoch_steps == 0 or self.step == config.steps

    @property
    def first_stage_ends(self) -> bool:
        return self.first_stage is not None and self.step == self.search.config.first_stage

    def add(self, losses: Tensor) -> None:
        """Count a step with its MSE and loss [2]."""
        self.sums += losses
        self.step, self.count = self.step + 1, self.count + 1

    def write(self, stopping: bool) -> float:
        """Write the row of an epoch that ends here, and the states due here. Returns the MSE since
        the last row. Raises AclaError where the loss diverged."""
        self.sums = self.search.processes.mean(self.sums)
        mse, loss = (self.sums / self.count).tolist()
        run_dir.require_finite(mse, self.step - self.count, self.step, self.folder)
        seconds = self.seconds
        if self.epoch_ends:
            if self.writes:
                run_dir.append_row(self.log, self.row(mse, loss) | {"seconds": seconds})
            self.sums, self.count = self.sums.zero_(), 0
        if not self.writes:
            return mse
        progress = {"step": self.step, "plan": asdict(self.search.plan), "data": self.digests}
        progress |= {"seconds": seconds, "seen": self.sums.tolist(), "count": self.count}
        if self.first_stage_ends:
            write_atomically(self.first_stage.with_suffix(".jsonl"), self.log.read_bytes())
            save_state(self.first_stage, trainer.state_tensors(self.search.parts), progress)
        if self.epoch_ends or stopping:
            save_state(self.state, trainer.state_tensors(self.search.parts), progress)
        return mse

    def row(self, mse: float, loss: float) -> dict[str, Any]:
        """The row of the log, except for its seconds: the losses, the gates, and the PSNR in dB on
        a few pictures of the network derived now."""
        search = self.search
        psnr = self.psnr(search.net.derive(search.positions()), MAX_SCORED)
        row = {"epoch": -(-self.step // search.config.epoch_steps), "step": self.step}
        row |= {"mse": mse, "loss": loss, **gate_report(search, self.step - 1)}
        return row | {"val_psnr": sum(psnr) / len(psnr)}

    def psnr(self, network: Backbone, *limit: int) -> list[float]:
        """PSNR in dB of each picture that scores, or of the first ones."""
        task, device = self.search.plan.task, self.search.processes.device
        return validation.each_psnr(network, self.scored, task, device, *limit)


# The whole search


def run_search(
    plan: SearchPlan,
    sets: Sets,
    out: Path,
    processes: Processes,
    first_stage: Path | None = None,
    notes: dict[str, Any] | None = None,
    budget: float | None = None,
) -> SearchResult:
    """Search anew or from the state in `out`. Writes search.jsonl and the state, and at the end
    arch.json, with `notes` in its evidence, and model.safetensors, the derived network with the
    supernet's weights. first_stage: see `SearchDir`; searches that differ in λ alone share it.
    budget: most multiply-adds of the network chosen from a front.

    Raises DataError where the pictures are not those of the state, AclaError where the loss
    diverges, and Stopped after a signal, with the state written."""
    search = Search(plan, sets, processes)
    folder = SearchDir(search, sets, out, first_stage)
    steps = range(folder.step, plan.search.steps)
    bar = console.progress(steps, initial=steps.start, total=steps.stop, unit="step", desc="search")
    with Stop(processes.world == 1) as stop:
        for step in bar:
            folder.add(search.step(step))
            stopping = stop.asked is not None
            if folder.epoch_ends or folder.first_stage_ends or stopping:
                mse, open_count = folder.write(stopping), len(search.positions())
                bar.set_postfix({"mse": f"{mse:.1f}", "open": open_count}, refresh=False)
            if stopping and folder.step < steps.stop:
                raise stop.at(folder.step, folder.state)
    return finish_search(search, sets, folder, notes or {}, budget)


def gate_report(search: Search, step: int) -> dict[str, Any]:
    """The gates for the log: τ; α, the probabilities that a gate of this step is open, and the
    positions open without noise; the expected cost in FLOPs; the share of keys kept, in all and by
    position."""
    net, config = search.net, search.config
    with torch.no_grad():
        probabilities = expected_gates(search.alpha_at(step))
        cost = net.cost({}, config.patch_size**2, probabilities)
    layers = torch.arange(1, len(probabilities) + 1, device=probabilities.device)
    density = net.density.tril().sum(1)
    return {
        "tau": temperature(config, step),
        "alpha": net.alpha.tolist(),
        "gates": probabilities.tolist(),
        "open": net.open_positions(),
        "cost": cost.item(),
        "kept": (density.sum() / layers.sum()).item(),
        "density": (density / layers).tolist(),
    }


def held_out(search: Search) -> Pairs:
    """Patches of α's pictures that no step has had."""
    count = -(-PATCHES // search.config.batch_size)
    drawn = [search.batch(search.config.steps + i, ALPHA)[:2] for i in range(count)]
    lows, targets = (torch.cat(part).split(AT_ONCE) for part in zip(*drawn, strict=True))
    return list(zip(lows, targets, strict=True))


def finish_search(
    search: Search, sets: Sets, folder: SearchDir, notes: dict[str, Any], budget: float | None
) -> SearchResult:
    """Derive the network, measure its cost on α's patches of one step, write both files."""
    plan, net, config, n = search.plan, search.net, search.config, search.config.patch_size**2
    positions, front = search.positions(), ()
    net.eval()
    if config.method == "front":
        pairs = held_out(search)
        best, front = search_front(net, pairs, search.processes, config.cost, budget)
        positions = best.positions
    low, _, _ = search.batch(config.steps, ALPHA)
    with torch.no_grad():
        gates = torch.tensor([j in positions for j in net.config.positions]).to(low)
        counts = search.mean_counts(net(low, gates)[1])
        cost = net.cost(counts, n, gates).item()
    derived = net.derive(positions)
    psnr = folder.psnr(derived)
    none, dense = (
        float(np.mean(folder.psnr(net.derive(p), MAX_SCORED))) for p in ((), net.config.positions)
    )
    evidence = {
        **provenance(search.processes.device),
        "processes": search.processes.world,
        "pictures": {name: len(paths) for name, paths in vars(sets).items() if paths},
        "data": folder.digests,
        "search": asdict(config),
        "val_psnr": sum(psnr) / len(psnr),
        "val_psnr_none": none,
        "val_psnr_dense": dense,
        **notes,
    }
    alpha, size = tuple(net.alpha.tolist()), config.patch_size
    architecture = Architecture(
        plan.task, derived.config, config.lam, config.seed, alpha, cost, size, evidence, front
    )
    if search.processes.first:
        network = folder.folder / run_dir.MODEL
        save_model(network, derived, derived.config, plan.task, evidence)
        write_atomically(folder.folder / ARCHITECTURE, architecture.to_json().encode())
    kept = {j: count.mean().item() / (n * plan.model.keys) for j, count in counts.items()}
    return SearchResult(architecture, tuple(psnr), kept, none, dense, config.gate_noise_end)
