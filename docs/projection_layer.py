"""A network for gray JPEGs trained with the projection as its last layer, or after half of the
steps, beside one trained without; all are scored with the projection, as `restore` uses them.

python docs/projection_layer.py --data DIR --seed 0 --json rows.jsonl
python docs/projection_layer.py --data DIR --init weights/car-q5-60-none.safetensors --lr 1e-4 \
    --steps 150 --q 10 40 75 95 --crop 96 --json rows.jsonl
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import fold, unfold

from acla import cli, console
from acla.config import ModelConfig, Task
from acla.data import jpeg
from acla.data.datasets import PatchSampler, Pictures, find_set, training_sets
from acla.data.degradations import jpeg_file
from acla.data.image import fit_channels, load, middle, round_8bit
from acla.data.metrics import psnr
from acla.files import write_rows
from acla.models.factory import build_network
from acla.models.serialization import load_model
from acla.training.trainer import adam, halved, restoration_loss, set_rate

MODEL = ModelConfig(blocks=8, width=32, channels=1, attention="none", keys=0)
BATCH, PATCH = 4, 32
FIRST = {"without": 1.0, "layer": 0.0, "layer, second half": 0.5}  # share of steps before it
SETS = ("LIVE1", "Kodak24")
DCT = torch.from_numpy(jpeg.dct(np.eye(64, dtype=np.float32).reshape(64, 8, 8)).reshape(64, 64)).T


def project(answer: Tensor, quantised: Tensor, steps: Tensor) -> Tensor:
    """`acla.data.jpeg.project` with a gradient: pictures [B, 1, 8m, 8n] in 0..1; quantised levels
    [B, 64, m·n]; quantisation steps [B, 64, 1]."""
    apart = DCT @ unfold(255 * answer - 128, 8, stride=8) / steps - quantised
    distance = apart.detach().square().mean(1, keepdim=True).sqrt()
    reach = (jpeg.TRUST / distance.clamp(min=jpeg.TRUST)).clamp(max=jpeg.WIDEST) / 2
    inside = quantised + torch.maximum(torch.minimum(apart, reach), -reach)
    return (fold(DCT.T @ (inside * steps), answer.shape[2:], 8, stride=8) + 128) / 255


def compress(clean: Tensor, quality: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gray [1, 8m, 8n] through a JPEG: picture in 0..1, `project`'s `quantised` and `steps`."""
    plane = jpeg.decode_cells("JPEG", jpeg_file(clean, quality)).planes[0]
    quantised = jpeg.decoded_levels(plane.levels, plane.steps).reshape(-1, 64).T
    parts = (plane.levels[None] / 255, quantised, plane.steps.reshape(64, 1))
    return tuple(torch.tensor(part, dtype=torch.float32) for part in parts)


def initial(args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(args.seed)
    return load_model(args.init).model if args.init else build_network(MODEL)


def train(sampler: PatchSampler, args: argparse.Namespace, first: float) -> torch.nn.Module:
    """A network after all steps, with the layer from a share of them on."""
    network = initial(args).train()
    optimizer = adam(network.parameters(), args.lr)
    for step in console.progress(range(args.steps), unit="step", desc="train"):
        set_rate(optimizer, halved(args.lr, step, max(1, args.steps // 6)))
        rngs = [np.random.default_rng((args.seed, step, index)) for index in sampler.indices]
        windows = [sampler.window(step, *pair) for pair in zip(sampler.indices, rngs, strict=True)]
        files = [compress(w, int(r.integers(5, 96))) for w, r in zip(windows, rngs, strict=True)]
        low, quantised, tables = (torch.stack(part) for part in zip(*files, strict=True))
        answer = network(low)
        if step >= first * args.steps:
            answer = project(answer, quantised, tables)
        optimizer.zero_grad()
        restoration_loss("psnr", answer, torch.stack(windows)).backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def gain(network: torch.nn.Module, pictures: list[Tensor], quality: int) -> float:
    """Mean gain over the file in dB, with the projection."""
    gains = []
    for clean in pictures:
        low, *cells = (part[None] for part in compress(clean, quality))
        answer = project(network(low), *cells)
        target, *both = (255 * one.numpy() for one in (clean[None], answer, low))
        gains.append(psnr(both[0], target) - psnr(both[1], target))
    return float(np.mean(gains))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train-set", default="BSD400")
    parser.add_argument("--init", type=Path, metavar="FILE", help="network to begin with")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--q", type=int, nargs="+", default=(10, 20, 40, 60, 75, 90, 95))
    parser.add_argument("--crop", type=int, default=128, help="side of the middles scored")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    paths, _ = training_sets(args.train_set, None, args.data)
    sampler = PatchSampler(Pictures(paths), Task("car", 5, 95), PATCH, BATCH, args.seed)
    paths = [path for name in SETS for path in find_set(name, args.data)]
    pictures = [middle(round_8bit(fit_channels(load(path), 1)), args.crop) for path in paths]
    networks = {"no more": initial(args).eval()} if args.init else {}
    networks |= {name: train(sampler, args, first) for name, first in FIRST.items()}
    rows = []
    for name, network in networks.items():
        gains = {f"q{q}": round(gain(network, pictures, q), 3) for q in args.q}
        rows.append({"trained": name, "seed": args.seed, "steps": args.steps, **gains})
    write_rows(args.json, rows)
    console.say(console.markdown(list(rows[0]), [list(map(str, row.values())) for row in rows]))


if __name__ == "__main__":
    cli.run(main)
