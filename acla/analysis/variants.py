"""Change the attention in one way at a time, and compare it with the paper's and with none.

    python -m acla.analysis.variants --seeds 0,1 --json variants.jsonl --task demosaic \
        --preset small --blocks 8 --width 32 --data DIR --train-set BSD400 --val-set Kodak24

The other flags are those of train.py, for networks of at least 8 blocks. The changes are ours, and
those that are no flags of train.py are here alone: a network's file does not hold its change.
`acla.analysis.trial --show` prints the table once more."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acla import cli
from acla.analysis import trial
from acla.errors import UsageError
from acla.models.attention import CrossLayerAttention, rings
from acla.training.trainer import Trainer

OUT = Path("runs/variants")
WIDE_RADIUS = 8.0  # pixels
SMALL_DEVIATION = 0.01  # deviation of h's initial weights
ATTENDED = "--attention acla --positions 2,4,6,8"


class OfQuery(CrossLayerAttention):
    """The module with the offsets and logits of a changed query, by `change` [B,C,H,W]."""

    def whole(self, query: Tensor, rows: Sequence[Tensor]) -> Tensor:
        return query + self(query, rows, counts=False)[0]  # part by part, so that it calls `locate`

    def locate(self, query: Tensor) -> Tensor:
        return super().locate(self.change(query))


def normalised(query: Tensor) -> Tensor:
    """Each pixel's features with mean 0 and deviation 1."""
    return F.layer_norm(query.movedim(1, -1), query.shape[1:2]).movedim(-1, 1)


def change_query(trainer: Trainer, change: Callable[[Tensor], Tensor]) -> None:
    for module in trainer.model.attention.values():
        module.__class__, module.change = OfQuery, change


def near_and_wide(trainer: Trainer) -> None:
    """16 keys: the 8 neighbours of a pixel, and a wide ring."""
    around = torch.tensor([place for place in np.ndindex(3, 3) if place != (1, 1)]) - 1
    offsets = torch.cat([around.T, rings(8, WIDE_RADIUS)], 1)
    for module in trainer.model.attention.values():
        bias = module.points.bias.data.unflatten(0, (module.layers, 3, module.keys))
        bias[:, :2] = offsets.to(bias)


def small_output(trainer: Trainer) -> None:
    for module in trainer.model.attention.values():
        nn.init.normal_(module.output.weight, std=SMALL_DEVIATION)


def scale_updates(
    trainer: Trainer,
    offsets: float = 1,
    logits: float = 1,
    linear: float = 1,
    warmup: float = 0,
    decay: float = 0,
) -> None:
    """Factors on the updates of offsets, of logits and of g and h; warmup: the share of the steps
    in which all updates of the attention rise from zero; decay: its weight decay, apart from the
    gradient (AdamW)."""
    model = trainer.model
    of_points = torch.tensor([offsets, offsets, logits], device=trainer.device)
    of_points = of_points.repeat_interleave(model.config.keys)
    attention: list[tuple[Tensor, float | Tensor]] = []
    for name, parameter in model.attention.named_parameters():
        kind, factor = name.split(".")[1], linear
        if kind == "points":
            factor = of_points.repeat(len(parameter) // len(of_points))
            factor = factor.view(-1, *[1] * (parameter.dim() - 1))
        attention.append((parameter, 1 if kind.startswith("mask") else factor))
    before: list[Tensor] = []
    done = iter(range(1, trainer.config.steps + 1))

    def begin(*_) -> None:
        before[:] = [parameter.detach().clone() for parameter, _ in attention]

    @torch.no_grad()
    def end(*_) -> None:
        step = next(done)
        share = min(1, step / (warmup * trainer.config.steps)) if warmup else 1
        for (parameter, factor), old in zip(attention, before, strict=True):
            update = share * factor * (parameter - old)
            parameter.copy_((1 - decay * trainer.lr(step)) * old + update)

    trainer.optimizer.register_step_pre_hook(begin)
    trainer.optimizer.register_step_post_hook(end)


VARIANTS: dict[str, tuple[str, trial.Change | None]] = {
    "none": ("--attention none", None),
    "acla": (ATTENDED, None),
    "offsets and logits x1 (paper)": (f"{ATTENDED} --offset-lr-mult 1", None),
    "offsets x100": (ATTENDED, functools.partial(scale_updates, offsets=10)),
    "offsets x100 and logits x1": (
        ATTENDED,
        functools.partial(scale_updates, offsets=10, logits=0.1),
    ),
    "query x255": (ATTENDED, functools.partial(change_query, change=lambda query: 255 * query)),
    "query normalised": (ATTENDED, functools.partial(change_query, change=normalised)),
    "keys on 3x3 and ring of 8 px": (ATTENDED, near_and_wide),
    "h from 0.01": (ATTENDED, small_output),
    "warm-up": (ATTENDED, functools.partial(scale_updates, warmup=0.25)),
    "g and h x10": (ATTENDED, functools.partial(scale_updates, linear=10)),
    "weight decay 0.1": (ATTENDED, functools.partial(scale_updates, decay=0.1)),
    "8 keys": (f"{ATTENDED} --keys 8", None),
    "32 keys": (f"{ATTENDED} --keys 32", None),
    "behind 1 to 4": ("--attention acla --positions 1,2,3,4", None),
    "behind 5 to 8": ("--attention acla --positions 5,6,7,8", None),
}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, trial.Networks, list[str]]:
    """As `trial.parse`, of the chosen variants."""
    parser = trial.trial_parser("acla.analysis.variants", __doc__, OUT)
    parser.add_argument("--variants", metavar="A,B", help="these alone, and none")
    args, common = parser.parse_known_args(argv)
    chosen = ["none", *args.variants.split(",")] if args.variants else VARIANTS
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise UsageError(f"--variants: unknown {unknown[0]!r}; known: {', '.join(VARIANTS)}")
    return args, {name: VARIANTS[name] for name in chosen}, common


def main(argv: list[str] | None = None) -> None:
    args, *networks = parse(argv)
    trial.report(args, trial.train_all(args, *networks))


if __name__ == "__main__":
    cli.run(main)
