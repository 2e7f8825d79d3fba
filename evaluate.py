"""Score a network, the untouched input or somebody else's pictures on sets of pictures."""

import argparse
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acla import cli
from acla.config import SETTING_DEFAULT, SETTING_FLAG, Task
from acla.console import check_json, notice, publish
from acla.data import metrics
from acla.data.datasets import find_set, match_stems
from acla.data.degradations import generator_for, jpeg_file, pair, untouched
from acla.data.image import fit_channels, load, save
from acla.data.jpeg import project_onto
from acla.distributed import Processes, join
from acla.errors import DataError, UsageError
from acla.files import provenance
from acla.models.serialization import load_model, read_header
from acla.restore import inference
from acla.restore.pretrained import PretrainedModels

DEFAULT_CHECKPOINT = Path("runs/train/model.safetensors")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_flags(args)
    processes = join(cli.pick_device(args.device))
    inference.keep_memory(processes.device)
    flags = cli.task_from_flags(args)
    sets = {name: find_set(name, args.data) for name in dict.fromkeys(args.dataset.split(","))}
    # Every wrong call is refused here, before the first picture
    method = pick_method(args, processes.device, sets)
    tasks = {name: pick_task(args, flags, method, name) for name in sets}
    if args.project and any(task.until for task in tasks.values()):
        raise UsageError("--project wants one quality, not a range: give --q N")
    folders = {name: make_folders(args, name, sets) for name in sets}

    results = []
    for name, paths in sets.items():
        images = score_set(method, tasks[name], paths, folders[name], args.seed, processes)
        results.append(result_entry(name, tasks[name], method, images))
    if processes.first:
        text = "\n".join(metrics.result_table(method.label, result) for result in results)
        made_on = {"seed": args.seed, "provenance": provenance(processes.device)}
        publish(text, {"results": results, **made_on}, args.json)
    processes.leave()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser(None, __doc__)
    add = parser.add_argument
    names = "NAME[,NAME...]"
    add("--dataset", required=True, metavar=names, help="sets to score; 'sample' is built in")
    cli.add_task_flags(parser, "the network's, else the set's")
    group = parser.add_argument_group("What is scored (one of these)")
    source = group.add_mutually_exclusive_group()
    text = f"a network (default: {DEFAULT_CHECKPOINT} if it is for the task, else a pretrained one)"
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help=text)
    source.add_argument("--baseline", action="store_true", help="the untouched input")
    text = "pictures made elsewhere, whose file stem starts with the original's "
    text += "(with several sets: DIR/NAME)"
    source.add_argument("--predictions", type=Path, metavar="DIR", help=text)
    several = "there as PNG (with several sets: in DIR/NAME)"
    add("--save", type=Path, metavar="DIR", help=f"write the restored pictures {several}")
    add("--save-inputs", type=Path, metavar="DIR", help=f"write the degraded inputs {several}")
    cli.add_json(parser, "the results")
    text = "side of a tile in low-quality pixels (default: whole pictures; halved when memory "
    text += "runs out)"
    add("--tile", type=int, metavar="N", help=text)
    text = "average the network over 8 flips and rotations: 8 times slower"
    add("--ensemble", action="store_true", help=text)
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    text = "number format of the network; auto: the device's fastest (default: fp32)"
    add("--precision", choices=inference.PRECISIONS, default="fp32", help=text)
    text = "car: the input and predictions are colour JPEGs, scored on RGB, as colour networks are"
    add("--colour", action="store_true", help=text)
    text = "car: project the answer onto the file's quantisation cells, as acla.restore does; "
    text += "another protocol than the papers'"
    add("--project", action="store_true", help=text)
    cli.add_common_flags(parser)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse impossible flags before any work is done. Raises UsageError."""
    inference.check_tile(args.tile)
    no_network = args.baseline or args.predictions
    for name, unset in {"ensemble": False, "project": False, "precision": "fp32"}.items():
        if no_network and getattr(args, name) != unset:
            raise UsageError(f"--{name} needs a network: leave out --baseline and --predictions")
    if args.predictions and args.save:
        raise UsageError("--save has nothing to write with --predictions")
    if args.predictions and not args.predictions.is_dir():
        raise UsageError(f"--predictions {args.predictions}: there is no such folder")
    if args.colour and not no_network:
        raise UsageError("--colour goes with --baseline or --predictions; a network has its colour")
    check_json(args.json)


# What is scored, and as which task


@dataclass
class Method:
    """What is scored. predict: (clean [C, H, W], path, task) → (prediction, target); model: its
    entry in the results; task, channels: those of a network."""

    label: str
    model: dict[str, Any]
    predict: Callable[[Tensor, Path, Task], tuple[Tensor, Tensor]]
    task: Task | None = None
    channels: int | None = None


def pick_method(
    args: argparse.Namespace, device: torch.device, sets: dict[str, list[Path]]
) -> Method:
    """The method that the flags choose."""
    channels = 3 if args.colour else None
    if args.baseline:

        def as_it_is(clean: Tensor, path: Path, task: Task) -> tuple[Tensor, Tensor]:
            return untouched(clean, task, generator_for(path.stem, args.seed), channels)

        return Method("untouched input", {"kind": "baseline"}, as_it_is, channels=channels)
    if args.predictions:
        files: dict[Path, Path] = {}
        for name, paths in sets.items():
            files |= match_stems(paths, folder_for(args.predictions, name, sets))

        def made_elsewhere(clean: Tensor, path: Path, task: Task) -> tuple[Tensor, Tensor]:
            return read_prediction(clean, path, files[path], task, channels)

        model = {"kind": "predictions", "folder": str(args.predictions)}
        return Method("predictions", model, made_elsewhere, channels=channels)
    return network(args.checkpoint or default_checkpoint(args, sets), device, args)


def network(file: Path, device: torch.device, args: argparse.Namespace) -> Method:
    """A network from a checkpoint, which also brings its task."""
    checkpoint = load_model(file)
    inference.check_ensemble(args.ensemble, checkpoint.task)
    if args.project and checkpoint.task.name != "car":
        raise UsageError(f"--project is for JPEG artifacts, and {file} for {checkpoint.task}")
    checkpoint.model.to(device)
    precision = inference.pick_precision(args.precision, device, checkpoint.task)

    def restored(clean: Tensor, path: Path, task: Task) -> tuple[Tensor, Tensor]:
        generator = generator_for(path.stem, args.seed)
        with inference.computing_in(precision, device):
            answer, target = inference.restored_pair(
                checkpoint, clean, task, generator, args.tile, args.ensemble
            )
        if args.project:
            answer = project_onto(answer, jpeg_file(target, task.setting))
        return answer, target

    config = checkpoint.config
    model = {"kind": "network", "checkpoint": str(file), **dataclasses.asdict(config)}
    model |= {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    model |= {"trained_for": str(checkpoint.task), "ensemble": args.ensemble, "tile": args.tile}
    model |= {"precision": precision, **({"projected": True} if args.project else {})}
    label = f"network {file}" + (", ensemble of 8" if args.ensemble else "")
    label += ", projected" if args.project else ""
    return Method(label, model, restored, checkpoint.task, config.channels)


def default_checkpoint(args: argparse.Namespace, sets: Iterable[str]) -> Path:
    """The network that train.py writes by default, where it is for the task of the flags, or else a
    pretrained one. Raises UsageError where there is neither."""
    file, flags = DEFAULT_CHECKPOINT, cli.task_from_flags(args)
    why = f"there is no {file}"
    if file.is_file():
        _, trained, _ = read_header(file)
        why = "" if covers(trained, flags, args) else f"{file} is for {trained}"
    if why:
        task = flags or metrics.TASK_OF_SET.get(next(iter(sets)), Task())
        try:
            pretrained = PretrainedModels(None, task, torch.device("cpu"), task.channels)
            setting = None if task.until or task.scale > 1 else task.setting
            file = pretrained.pick(setting, task.channels == 3).path
        except UsageError as error:
            raise UsageError(
                f"{why}, and {error}; or give --baseline or --predictions DIR"
            ) from error
    because = f", since {why}" if why else ""
    notice(f"checkpoint {file}: the default{because}; --checkpoint changes it")
    return file


def covers(trained: Task, flags: Task | None, args: argparse.Namespace) -> bool:
    """Whether a network of this task is for the task of the flags, or for any without them."""
    if flags and cli.names_no_setting(args, flags.name):
        return flags.name == trained.name
    return flags is None or trained.covers(flags)


def read_prediction(
    clean: Tensor, path: Path, file: Path, task: Task, channels: int | None = None
) -> tuple[Tensor, Tensor]:
    """(prediction, target) [C, H, W] of a picture made elsewhere. Raises DataError for its size."""
    _, target = pair(clean, task, generator_for(path.stem), channels)
    prediction = load(file)
    if prediction.shape[1:] != target.shape[1:]:
        size, wanted = (f"{x.shape[2]}×{x.shape[1]}" for x in (prediction, target))
        raise DataError(f"{file}: {size} pixels, but {wanted} are wanted for {path.name} ({task})")
    if len(target) == 1 or len(clean) == 1:
        prediction = fit_channels(prediction, len(target))
    return prediction, target


def pick_task(args: argparse.Namespace, flags: Task | None, method: Method, name: str) -> Task:
    """The flags' task, or the checkpoint's, or the set's. Raises UsageError if they disagree."""
    trained = method.task
    if trained is None:
        return flags or metrics.task_of_set(name)
    if flags is None or (flags.name == trained.name and cli.names_no_setting(args, trained.name)):
        if not trained.until:
            return trained
        usual, flag = SETTING_DEFAULT[trained.name], SETTING_FLAG[trained.name]
        scored = Task(trained.name, usual)
        if not trained.covers(scored):
            scored = Task(trained.name, trained.setting or trained.until)
        notice(f"{method.label}, trained for {trained}, is scored on {scored}; --{flag} changes it")
        return scored
    if flags.name != trained.name or flags.scale != trained.scale:
        raise UsageError(f"{method.label} was trained for {trained}, not for {flags}")
    if not trained.covers(flags):
        notice(f"{method.label} was trained for {trained} and is scored on {flags}")
    return flags


# The loop

Folders = tuple[Path | None, Path | None]  # of restored pictures and of inputs


def folder_for(folder: Path, name: str, sets: dict[str, list[Path]]) -> Path:
    """The folder of one set's pictures: below the given one if there are several sets."""
    return folder / name if len(sets) > 1 else folder


def make_folders(args: argparse.Namespace, name: str, sets: dict[str, list[Path]]) -> Folders:
    """The folders for one set's pictures. Raises UsageError if a file would be overwritten."""
    if args.save and args.save == args.save_inputs:
        raise UsageError("--save and --save-inputs must be two folders")
    folders = [given and folder_for(given, name, sets) for given in (args.save, args.save_inputs)]
    for folder in filter(None, folders):
        written = {(folder / f"{path.stem}.png").resolve() for path in sets[name]}
        if len(written) < len(sets[name]) or written & {path.resolve() for path in sets[name]}:
            raise UsageError(
                f"{folder}: pictures of set {name!r} would be overwritten there; "
                "name another folder, or give the originals stems that differ"
            )
        folder.mkdir(parents=True, exist_ok=True)
    return folders[0], folders[1]


def score_set(
    method: Method, task: Task, paths: list[Path], folders: Folders, seed: int, processes: Processes
) -> list[dict[str, Any]]:
    """A row for each picture; processes divide the pictures."""
    rows = {}
    own = paths[processes.rank :: processes.world]
    quiet = None if processes.first else True  # None: where standard error is a file

    predict = functools.partial(method.predict, task=task)
    for scored in metrics.score_pictures(predict, own, task, desc=str(task), disable=quiet):
        path = scored.path
        if folders[0]:
            save(scored.prediction, folders[0] / f"{path.stem}.png")
        if folders[1]:
            low, _ = pair(scored.clean, task, generator_for(path.stem, seed), method.channels)
            save(low, folders[1] / f"{path.stem}.png")
        row = {name: getattr(scored, name) for name in ("psnr", "ssim", "seconds")}
        rows[path] = {"name": path.name, **row}
    rows = {path: row for share in processes.all_rows(rows) for path, row in share.items()}
    return [rows[path] for path in paths]


# What is reported


def result_entry(
    name: str, task: Task, method: Method, images: list[dict[str, Any]]
) -> dict[str, Any]:
    """One entry of the results: everything needed to compare it later."""
    scores = {key: [row[key] for row in images if row[key] is not None] for key in ("psnr", "ssim")}
    if small := len(images) - len(scores["ssim"]):
        notice(
            f"{name}: {small} of {len(images)} pictures are too small for SSIM and left out of it"
        )
    protocol = metrics.protocol_line(task, method.model["kind"] == "baseline", method.channels)
    precision, projected = method.model.get("precision", "fp32"), method.model.get("projected")
    protocol += f"; network in {precision}" * (precision != "fp32")
    if projected:
        protocol += "; projected onto the file's quantisation cells, unlike the papers'"
    in_colour = task.name == "car" and method.channels == 3
    return {
        "dataset": name,
        "task": task.name,
        "setting": task.setting,
        "until": task.until,
        "protocol": protocol,
        "model": method.model,
        "images": images,
        "mean": {key: sum(own) / len(own) if own else None for key, own in scores.items()},
        "published": {} if in_colour or projected else metrics.published(name, task),
    }


command = functools.partial(cli.run, main)  # acla-evaluate

if __name__ == "__main__":
    command()
