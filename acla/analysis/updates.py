"""Show how the parts of a network learn: gradients, updates and the attention's keys.

    python -m acla.analysis.updates --task demosaic --preset small --blocks 8 --width 32 \
        --positions 2,4,6,8 --steps 1000 --val-every 250 --data DIR --train-set BSD400

Trains as train.py does with the same flags, and writes no network. After every --val-every steps,
one row for each part, over the last WINDOW steps: root mean square of weights and gradient; the
agreement of the gradients, the norm of their mean over the mean of their norms (1 of equal ones,
1/√WINDOW of independent ones, less of such that cancel); the update of a step and the distance from
the initial weights, both relative to the weights. One more row for each attention module: how its
keys lie on the first validation picture."""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from acla import cli, console
from acla.analysis.attribution import module_inputs
from acla.distributed import Processes
from acla.errors import UsageError
from acla.files import write_rows
from acla.models.attention import rings
from acla.models.backbones import Backbone
from acla.scripts import train
from acla.training.trainer import Trainer
from acla.training.validation import validation_pair

LAST_STEPS = 20  # steps
PART_OF = {"value": "values g", "value_bias": "values g", "mask": "masks", "mask_bias": "masks"}
PART_OF |= {"output.weight": "output h", "output.bias": "output h"}
Split = dict[str, Tensor]


def split(named: Iterable[tuple[str, Tensor]], model: Backbone) -> Split:
    """All tensors of a part, named as parameters, in one vector: of the backbone, and of all
    attention modules their offsets, logits, values, output and masks."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in named:
        leaf = name.split(".", 2)[-1]
        if not name.startswith("attention."):
            parts.setdefault("backbone", []).append(tensor)
        elif leaf.startswith("points."):
            points = tensor.unflatten(0, (-1, 3, model.config.keys))
            parts.setdefault("offsets", []).append(points[:, :2])
            parts.setdefault("logits", []).append(points[:, 2])
        else:
            parts.setdefault(PART_OF.get(leaf, leaf), []).append(tensor)
    return {part: torch.cat([t.detach().flatten() for t in own]) for part, own in parts.items()}


def weights_of(model: Backbone) -> Split:
    return split(((n, p) for n, p in model.named_parameters() if p.requires_grad), model)


class StepStatistics:
    """What the last steps before a row did to every part. initial: the weights of step 0."""

    def __init__(self, initial: Split):
        self.initial = self.before = initial
        self.gradients: list[Split] = []
        self.updates: list[Split] = []

    def begin(self, model: Backbone) -> None:
        self.before, self.gradients, self.updates = weights_of(model), [], []

    def add(self, model: Backbone) -> None:
        after = weights_of(model)
        self.updates.append({part: after[part] - self.before[part] for part in after})
        named = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
        self.gradients.append(split(named, model))
        self.before = after

    def rows(self) -> list[dict[str, Any]]:
        """One row for each part; the module docstring says of what."""
        rows = []
        for part, weights in self.before.items():
            gradients = torch.stack([one[part] for one in self.gradients])
            scale = rms(weights) or math.nan
            mean, norms = gradients.mean(0).norm(), gradients.norm(dim=1).mean()
            rows.append(
                {
                    "part": part,
                    "weights": rms(weights),
                    "gradient": rms(gradients),
                    "agreement": (mean / norms).item(),
                    "update": rms(torch.stack([one[part] for one in self.updates])) / scale,
                    "moved": rms(weights - self.initial[part]) / scale,
                }
            )
        return rows


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


# Keys


@torch.no_grad()
def key_rows(model: Backbone, low: Tensor) -> list[dict[str, Any]]:
    """How the keys of every attention module lie on a picture [C,H,W]: the mean distance of a key's
    mean position from the initial one, and the deviation over the picture, in pixels; the keys that
    a layer's softmax weighs, e to its entropy; the share that the masks keep."""
    was_training = model.training
    with module_inputs(model.eval()) as inputs:
        _, kept = model.forward_with_counts(low[None])
    model.train(was_training)
    rows = []
    for position, (query, *_) in inputs.items():
        module = model.attention[str(position)]
        points = rearrange(module.locate(query), "1 h w l yxw k -> (h w) l yxw k")
        offsets, logits = points[:, :, :2], points[:, :, 2]
        initial = rings(module.keys, module.offset_radius).to(offsets)
        weights = logits.softmax(-1)
        entropy = -(weights * weights.log()).nansum(-1)
        rows.append(
            {
                "module": position,
                "moved_px": (offsets.mean(0) - initial).norm(dim=1).mean().item(),
                "spread_px": offsets.var(0).sum(1).sqrt().mean().item(),
                "effective_keys": entropy.exp().mean().item(),
                "kept": kept[position].sum().item() / logits.numel(),
            }
        )
    return rows


# The training


def train_rows(trainer: Trainer, plan: Any, data: train.Data) -> Iterable[list[dict[str, Any]]]:
    """Train, and yield the rows after every --val-every steps."""
    every, model = plan.train.val_every, trainer.model
    if every <= LAST_STEPS:
        raise UsageError(f"--val-every {every}: give more than {LAST_STEPS} steps")
    low, _ = validation_pair(data.validation, 0, plan.task, plan.model.channels)
    window = StepStatistics(weights_of(model))
    steps = plan.train.steps // every * every
    for step in console.progress(range(steps), unit="step", desc="train"):
        if step % every == every - LAST_STEPS:
            window.begin(model)
        trainer.step(step, data.sampler.indices, *data.loader.batch(step))
        if step % every >= every - LAST_STEPS:
            window.add(model)
        if (step + 1) % every == 0:
            psnr = train.validate(trainer, plan, data)["val_psnr"]
            rows = window.rows() + key_rows(model, low.to(trainer.device))
            yield [{"step": step + 1, "val_psnr": psnr, **row} for row in rows]


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one kind as Markdown."""
    cell = {"step": str, "part": str, "module": str, "kept": "{:.1%}".format}
    plain = ("moved_px", "spread_px", "effective_keys", "val_psnr")
    cell |= dict.fromkeys(plain, "{:.2f}".format)
    heads = [head.replace("_", " ") for head in rows[0]]
    return console.markdown(
        heads, [[cell.get(k, "{:.1e}".format)(v) for k, v in row.items()] for row in rows]
    )


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The command's own flags, and those of train.py."""
    parser = cli.parser("acla.analysis.updates", __doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="write the rows there, one a line")
    args, words = parser.parse_known_args(argv)
    return args, train.parse(words)


def main(argv: list[str] | None = None) -> None:
    args, flags = parse(argv)
    processes = Processes(cli.pick_device(flags.device))
    plan = train.plan_from_flags(flags, cli.pick_preset(flags.preset, processes.device))
    data = train.load_data(plan, flags, processes)
    trainer, _ = train.restore_or_init(plan, flags, processes, data, None, None)
    rows = [row for some in train_rows(trainer, plan, data) for row in some]
    if args.json:
        write_rows(args.json, rows)
    for kind in ("part", "module"):
        if own := [row for row in rows if kind in row]:
            console.say(rows_table(own) + "\n")


if __name__ == "__main__":
    cli.run(main)
