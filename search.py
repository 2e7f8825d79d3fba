"""Search where attention is worth its cost: a supernet with a module behind every block, then
arch.json.

    python search.py --task car --q 10
    python search.py --task sr --scale 2 --backbone rcan --data DIR --train-set DIV2K
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from acla import cli, config, training
from acla.architecture import Architecture, for_task
from acla.checkpoint import load_state, save_model, save_state, write_atomically
from acla.config import ModelConfig, SearchConfig, Task
from acla.cost import full_attention_flops
from acla.data import PatchSampler, Pictures, find_set, sample, split_for_search
from acla.gate import draw_gates, expected_gates
from acla.supernet import Supernet

OUT = Path("runs/search")
STATE = "supernet.safetensors"
WEIGHTS, ALPHA = 0, 1  # the streams of noise of the two kinds of step


@dataclass(frozen=True)
class Plan:
    """Everything that decides how a search goes."""

    task: Task
    model: ModelConfig
    search: SearchConfig


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = cli.pick_device(args.device)
    cli.require_one_process()
    state = training.open_run(args.out, STATE, args.resume)
    if state is None:
        plan = plan_from_flags(args, cli.pick_preset(args.preset, device))
        cli.tell_of_sample(args)
        search(plan, args, device)
    else:
        tensors, progress = load_state(state)
        plan = training.resumed_plan(Plan, progress, args)
        search(plan, args, device, tensors, progress)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_run_flags(parser, OUT, "search")
    config.add_flags(parser, SearchConfig)
    config.add_flags(parser, ModelConfig, but=("attention", "positions"))
    return parser.parse_args(argv)


def plan_from_flags(args: argparse.Namespace, preset: str) -> Plan:
    """The search that the flags describe; the preset's unless they say otherwise."""
    task = config.task_from_flags(args) or Task()
    backbone = getattr(args, "backbone", "edsr")
    model = for_task(config.override(config.model_preset(preset, task, backbone), args), task)
    how = config.search_preset(preset, task, backbone)
    return Plan(task, model, config.override_length(how, args))


# The search


def search(
    plan: Plan,
    args: argparse.Namespace,
    device: torch.device,
    tensors: dict[str, Tensor] | None = None,
    progress: dict | None = None,
) -> None:
    """Both stages, from the start or from a state: weights alone, then weights and α in turn.
    Writes the state and a row of the log after every epoch, and at the end what was found."""
    how, out = plan.search, args.out
    flags = progress["flags"] if progress else {"preset": args.preset}
    for_weights, for_alpha = search_sets(how.train_set, args.data)
    data = {"weights": training.digest(for_weights), "alpha": training.digest(for_alpha)}
    samplers = [
        make_sampler(plan, paths, stream)
        for stream, paths in ((WEIGHTS, for_weights), (ALPHA, for_alpha))
    ]
    torch.manual_seed(how.seed)
    net = Supernet(plan.model).to(device).train()
    weights = training.adam(net.weights, how.rate)
    alpha = training.adam([net.alpha], how.alpha_rate)
    parts = {"supernet": net, "weights": weights, "alpha": alpha}
    start, seconds = 0, 0.0
    if progress:
        training.require_same_data(progress, data)
        training.unpack(parts, tensors, out / STATE)
        start, seconds = progress["step"], progress["seconds"]
    out.mkdir(parents=True, exist_ok=True)
    training.drop_rows_after(out / "search.jsonl", start)
    cli.notice(
        f"{plan.task}: {plan.model.backbone} of {plan.model.blocks} blocks × {plan.model.width}, "
        f"λ {how.lam:g}; {how.steps} steps of {how.batch} patches of {how.patch}², the first "
        f"{how.first_stage} for the weights alone; {len(for_weights)} pictures of "
        f"{how.train_set} for the weights, {len(for_alpha)} for α; on {device}"
    )
    total, count, begun = torch.zeros((), device=device), 0, time.monotonic()
    bar = cli.progress(
        range(start, how.steps), initial=start, total=how.steps, unit="step", desc="search"
    )
    for step in bar:
        tau = temperature(how, step)
        total += weight_step(plan, net, weights, samplers[WEIGHTS], step, tau)
        if step >= how.first_stage:
            alpha_step(plan, net, alpha, samplers[ALPHA], step, tau)

        done, count = step + 1, count + 1
        if done % how.epoch_steps and done < how.steps:
            continue
        mse = total.item() / count
        training.require_finite(mse, done - count, done, out)
        row = {"epoch": -(-done // how.epoch_steps), "step": done, "tau": tau, "mse": mse}
        row |= {**gate_report(plan, net), "seconds": round(seconds + time.monotonic() - begun, 2)}
        bar.set_postfix(
            refresh=False, mse=f"{mse:.1f}", open=len(net.open_positions()), tau=f"{tau:.2f}"
        )
        training.append_row(out / "search.jsonl", row)
        state = {**row, "plan": asdict(plan), "data": data, "flags": flags}
        save_state(out / STATE, training.pack(parts), state)
        total, count = total.zero_(), 0
    report(plan, net, samplers[ALPHA], args, device)


def search_sets(name: str, root: Path | None) -> tuple[list[Path], list[Path]]:
    """The pictures for the weights and those for α: disjoint."""
    if name == "sample":
        return sample("train"), sample("val")
    return split_for_search(find_set(name, root, "train"))


def make_sampler(plan: Plan, paths: list[Path], stream: int) -> PatchSampler:
    """The patches of one kind of step; no seed of one kind is a seed of the other."""
    how, channels = plan.search, plan.model.channels
    seed = 2 * how.seed + stream
    return PatchSampler(Pictures(paths), plan.task, how.patch, how.batch, seed, channels=channels)


def temperature(how: SearchConfig, step: int) -> float:
    """τ of Eq. 10: constant while the weights train alone, then falling geometrically to its
    end."""
    share = max(0, step - how.first_stage) / max(1, how.steps - 1 - how.first_stage)
    return how.tau * (how.tau_end / how.tau) ** share


def weight_step(
    plan: Plan,
    net: Supernet,
    optimizer: torch.optim.Optimizer,
    sampler: PatchSampler,
    step: int,
    tau: float,
) -> Tensor:
    """Descend ∇_w of Eq. 14 on training patches, with gates drawn and α as it is. Returns the MSE
    on 0..255."""
    how = plan.search
    training.set_rate(optimizer, training.cosine(how.rate, step, how.steps))
    low, target, seeds = batch(plan, sampler, step, WEIGHTS, net.alpha.device)
    fixed = net.alpha.detach()
    gates = draw_gates(fixed, training.gate_seed(how.seed, step, WEIGHTS), tau)
    restored, kept = net(low, gates, seeds)
    mse = training.restoration_loss("mse", restored, target)
    cost = net.cost(kept, low.shape[2] * low.shape[3], expected_gates(fixed))
    optimizer.zero_grad(set_to_none=True)
    (mse + how.lam * cost.log()).backward()
    optimizer.step()
    return mse.detach()


def alpha_step(
    plan: Plan,
    net: Supernet,
    optimizer: torch.optim.Optimizer,
    sampler: PatchSampler,
    step: int,
    tau: float,
) -> None:
    """Descend ∇_α of Eq. 14 on validation patches, with the weights as they are."""
    how = plan.search
    rate = training.cosine(how.alpha_rate, step - how.first_stage, how.steps - how.first_stage)
    training.set_rate(optimizer, rate)
    low, target, seeds = batch(plan, sampler, step, ALPHA, net.alpha.device)
    gates = draw_gates(net.alpha, training.gate_seed(how.seed, step, ALPHA), tau)
    with net.weights_fixed():
        restored, kept = net(low, gates, seeds)
        mse = training.restoration_loss("mse", restored, target)
        cost = net.cost(kept, low.shape[2] * low.shape[3])
        optimizer.zero_grad(set_to_none=True)
        (mse + how.lam * cost.log()).backward()
    optimizer.step()


def batch(
    plan: Plan, sampler: PatchSampler, step: int, stream: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Degraded patches, their targets and the seeds of their masks."""
    low, target = sampler.batch(step)
    seeds = training.image_seeds(plan.search.seed, step, sampler.indices, stream)
    return low.to(device), target.to(device), seeds.to(device)


# What was found


def gate_report(plan: Plan, net: Supernet) -> dict[str, object]:
    """The search's state for its log: α, the gates' probabilities σ(α), the expected cost in FLOPs,
    the keys kept."""
    n = plan.search.patch**2
    with torch.no_grad():
        chance = expected_gates(net.alpha)
        cost = net.cost({}, n)
    pairs = net.density.tril().sum() / (len(chance) * (len(chance) + 1) / 2)
    return {
        "alpha": net.alpha.tolist(),
        "gates": chance.tolist(),
        "cost": cost.item(),
        "kept": pairs.item(),
    }


def report(
    plan: Plan,
    net: Supernet,
    sampler: PatchSampler,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Derive the network, measure its cost on validation patches, write arch.json and print the
    table of positions."""
    how, out = plan.search, args.out
    positions, n = net.open_positions(), how.patch**2
    low, _, _ = batch(plan, sampler, how.steps, ALPHA, device)
    net.eval()
    with torch.no_grad():
        gates = draw_gates(net.alpha, None, 1.0)
        _, kept = net(low, gates)
        cost = net.cost(kept, n, gates).item()
    derived = net.derive(positions)
    pictures = Pictures(sampler.pictures.paths)
    psnr = training.mean_psnr(derived, pictures, plan.task, device)
    architecture = Architecture(
        plan.task, derived.config, how.lam, how.seed, tuple(net.alpha.tolist()), cost, how.patch
    )
    info = {"search": asdict(how), "val_psnr": psnr}
    save_model(out / "model.safetensors", derived, derived.config, plan.task, info)
    write_atomically(out / "arch.json", architecture.to_json().encode())

    dense = full_attention_flops(
        plan.model.blocks, n, plan.model.width, plan.model.keys, masked=True
    )
    print("position   alpha  chance  keys kept  module")
    for j, (value, chance) in enumerate(
        zip(net.alpha.tolist(), expected_gates(net.alpha).tolist(), strict=True), 1
    ):
        share = kept[j].mean().item() / (n * plan.model.keys) if j in kept else None
        shown = f"{share:9.1%}" if share is not None else "        –"
        print(f"{j:8d}  {value:+.3f}  {chance:6.2f}  {shown}  {'open' if j in kept else '–'}")
    undecided = [c for c in expected_gates(net.alpha).tolist() if 0.1 < c < 0.9]
    if undecided:
        cli.notice(
            f"{len(undecided)} of {len(net.alpha)} gates are still undecided "
            "(chance between 0.1 and 0.9): a longer search, --steps, settles them"
        )
    print(f"positions: {config.format_positions(positions)}")
    print(
        f"attention costs {cost / 2e6:.1f} M multiply-adds for {how.patch}×{how.patch} pixels, "
        f"{1 - cost / dense:.1%} less than a module behind every block ({dense / 2e6:.1f} M)"
    )
    print(f"{plan.task}: {psnr:.2f} dB on the validation pictures with the supernet's weights")
    print(f"written: {out / 'arch.json'} · {out / 'search.jsonl'} · {out / 'model.safetensors'}")


if __name__ == "__main__":
    cli.run(main)
