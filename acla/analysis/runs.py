"""Runs of train.py that evaluate.py scored: from their folders, into one file and back."""

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acla.analysis.scores import name_column, protocol_lines, read_results
from acla.config import RENAMED, ModelConfig, TrainConfig, from_dict
from acla.errors import NOT_VALID, AclaError, UsageError
from acla.models.serialization import load_model

MODEL, SCORES = "model.safetensors", "scores.json"
NOT_SHOWN = {"seed", "epoch_steps", "val_every"}  # decide nothing about the network, or are a run's


@dataclass(frozen=True)
class Run:
    """A run that was trained and scored. folder: its last name; model: its network; how: every
    field of its configurations but the seed's, and how it was scored; seconds: of training, per
    step, validation included; psnr: {set and setting: dB}; pictures: {set and setting: {file name:
    dB}}; protocol: how it was scored, as lines; commit: that trained it."""

    folder: str
    model: ModelConfig
    how: dict[str, Any]
    seed: int
    seconds: float
    psnr: dict[str, float]
    pictures: dict[str, dict[str, float]]
    protocol: str
    commit: str | None


def read_run(folder: Path) -> Run:
    """A folder of train.py in which evaluate.py --json wrote scores.json. Raises AclaError."""
    if not (folder / SCORES).is_file():
        raise AclaError(
            f"{folder} holds no {SCORES}: python evaluate.py --dataset NAME --checkpoint "
            f"{folder / MODEL} --json {folder / SCORES}"
        )
    found = load_model(folder / MODEL)
    try:
        training, done = from_dict(TrainConfig, found.info["train"]), found.info["step"]
        begun = found.info.get("begun_with")
        how = {**dataclasses.asdict(found.task), **dataclasses.asdict(found.config)}
        how |= dataclasses.asdict(training)
        begun = begun and f"{begun['file']} {begun['sha256'][:8]}"
        how |= {"begun_with": begun, "pictures": found.info["data"]["train"]}
        seconds, commit = found.info["seconds"] / done, found.info.get("commit")
    except (UsageError, *NOT_VALID) as error:
        raise AclaError(f"{folder / MODEL}: train.py did not write it: no {error}") from error
    how = {name: value for name, value in how.items() if name not in NOT_SHOWN}
    digest = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
    psnr, pictures, results = {}, {}, read_results(folder / SCORES)
    for result in results:
        scored = Path(result["model"].get("checkpoint", ""))
        if (scored.parent.name, scored.name) != (folder.resolve().name, MODEL):
            raise AclaError(f"{folder / SCORES}: the scores of {scored}, not of {folder / MODEL}")
        if result["model"].get("sha256", digest) != digest:
            raise AclaError(
                f"{folder / SCORES}: {folder / MODEL} was written anew since: score it again"
            )
        how |= {name: result["model"].get(name) for name in ("tile", "ensemble")}
        column = name_column(result)
        psnr[column] = result["mean"]["psnr"]
        pictures[column] = {image["name"]: image["psnr"] for image in result["images"]}
    if None in itertools.chain(psnr.values(), *(p.values() for p in pictures.values())):
        raise AclaError(f"{folder / SCORES}: a picture is restored exactly, PSNR has no mean")
    return Run(
        folder=folder.resolve().name,
        model=found.config,
        how=how,
        seed=training.seed,
        seconds=seconds,
        psnr=psnr,
        pictures=pictures,
        protocol=protocol_lines(results),
        commit=commit,
    )


def read_kept(path: Path) -> list[Run]:
    """The runs in a file that acla.analysis.compare --json wrote. Raises AclaError."""
    try:
        return [kept(run) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except (UsageError, AttributeError, *NOT_VALID) as error:
        raise AclaError(f"{path}: not a file of acla.analysis.compare --json: {error!r}") from error


def kept(run: dict[str, Any]) -> Run:
    """A run from JSON."""
    figures = {
        "model": from_dict(ModelConfig, run["model"]),
        "how": {RENAMED.get(name, name): value for name, value in run["how"].items()},
        "seconds": float(run["seconds"]),
        "psnr": {column: float(psnr) for column, psnr in run["psnr"].items()},
        "pictures": {
            column: {name: float(psnr) for name, psnr in of_picture.items()}
            for column, of_picture in run["pictures"].items()
        },
    }
    return Run(**{**run, **figures})
