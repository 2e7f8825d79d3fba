"""What `acla.restore` gains on JPEGs of every quality: a table, and a figure (extra `report`).

Each picture, or the middle of it, becomes a JPEG in colour (4:2:0); the command restores it to PNG
or JPEG. PSNR of Y in floating point, from RGB of 8 bits, or of RGB."""

import argparse
import contextlib
import io
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch import Tensor

from acla import cli, console
from acla.analysis import plots
from acla.data.datasets import find_set
from acla.data.image import load, luma, middle, to_levels, to_rgb
from acla.data.metrics import psnr
from acla.files import provenance
from acla.restore import __main__ as restore

HEAD = ("quality", "JPEG, dB", "restored, dB", "gain, dB", "least", "most")


def measure(
    clean: dict[str, Tensor], quality: int, flags: list[str], rgb: bool, suffix: str
) -> dict[str, Any]:
    """PSNR of JPEGs of a quality and of what is restored, by name. clean: RGB [3, H, W]."""
    with TemporaryDirectory() as folder:
        low, high = Path(folder, "low"), Path(folder, "high")
        low.mkdir()
        for name, picture in clean.items():
            Image.fromarray(to_levels(picture)).save(low / f"{name}.jpg", quality=quality)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            restore.main([str(low), str(high), "--suffix", suffix, *flags])
        return {
            "quality": quality,
            "jpeg": {name: file_psnr(low / f"{name}.jpg", x, rgb) for name, x in clean.items()},
            "restored": {
                name: file_psnr(high / f"{name}{suffix}", x, rgb) for name, x in clean.items()
            },
        }


def file_psnr(path: Path, clean: Tensor, rgb: bool) -> float:
    """PSNR of Y or RGB, in dB, of a picture file, to 0.001."""
    pictures = [x.double() if rgb else luma(x.double()) for x in (load(path), clean)]
    return round(psnr(*(255 * x.permute(1, 2, 0).numpy() for x in pictures)), 3)


def gains(row: dict[str, Any]) -> list[float]:
    return [row["restored"][name] - value for name, value in row["jpeg"].items()]


def gains_table(rows: list[dict[str, Any]]) -> str:
    """A line for each quality: means, and the gain of the pictures that gain least and most."""
    lines = []
    for row in rows:
        means = [statistics.mean(row[kind].values()) for kind in ("jpeg", "restored")]
        own = gains(row)
        cells = [f"{mean:.2f}" for mean in means]
        cells += [f"{gain:+.2f}" for gain in (statistics.mean(own), min(own), max(own))]
        lines.append([str(row["quality"]), *cells])
    return console.markdown(HEAD, lines)


def draw_gains(rows: list[dict[str, Any]], path: Path, rgb: bool) -> None:
    """Gain over quality: the mean, and the range of all pictures."""
    figure, axis = plots.require_pyplot().subplots(figsize=(7, 4), layout="constrained")
    at = [row["quality"] for row in rows]
    own = [gains(row) for row in rows]
    axis.fill_between(at, list(map(min, own)), list(map(max, own)), alpha=0.25, label="pictures")
    axis.plot(at, list(map(statistics.mean, own)), marker="o", ms=3, label="mean")
    axis.axhline(0, color="black", lw=0.8)
    axis.set(xlabel="JPEG quality", ylabel=f"gain over the file (dB, {'RGB' if rgb else 'Y'})")
    axis.legend()
    plots.save_figure(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.qualities", __doc__)
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME[,NAME...]", help="sets")
    add("--q", type=int, nargs="+", default=[*range(5, 100, 5)], help="(default: 5 10 … 95)")
    add("--crop", type=int, metavar="N", help="of the middle alone (default: all)")
    yes_or_no = argparse.BooleanOptionalAction
    add("--project", action=yes_or_no, default=True, help="as of acla.restore")
    add("--suffix", choices=(".png", ".jpg"), default=".png", help="of the restored pictures")
    add("--rgb", action="store_true", help="PSNR of RGB, not of Y")
    text = "the network (default: as acla.restore)"
    add("--checkpoint", type=Path, metavar="FILE", help=text)
    cli.add_json(parser, "the PSNR of every picture")
    add("--plot", type=Path, metavar="FILE", help="write the figure there")
    cli.add_common_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    console.check_json(args.json)
    if args.plot:
        plots.require_pyplot()
    clean = {
        f"{name}-{path.stem}": to_rgb(middle(load(path), args.crop))
        for name in args.dataset.split(",")
        for path in find_set(name, args.data)
    }
    flags = ["--device", args.device, "--precision", "fp32"]
    flags += [] if args.project else ["--no-project"]
    flags += ["--checkpoint", str(args.checkpoint)] if args.checkpoint else []
    rows = [
        measure(clean, q, flags, args.rgb, args.suffix)
        for q in console.progress(args.q, unit="quality")
    ]
    if args.plot:
        draw_gains(rows, args.plot, args.rgb)
    made_on = {"crop": args.crop, "project": args.project, "rgb": args.rgb}
    made_on |= {"suffix": args.suffix}
    made_on |= {"checkpoint": args.checkpoint and str(args.checkpoint)}
    made_on |= {"provenance": provenance(cli.pick_device(args.device))}
    text = f"{len(clean)} pictures of {args.dataset}\n\n{gains_table(rows)}"
    console.publish(text, {"rows": rows, **made_on}, args.json)


if __name__ == "__main__":
    cli.run(main)
