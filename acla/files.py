"""Files: where a result comes from, atomic writing, rows of JSON."""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from acla.errors import reading
from acla.kernels.timing import commit

Row = dict[str, Any]  # values by name
PACKAGES = ("torch", "triton", "numpy", "pillow", "scikit-image")


def provenance(device: torch.device) -> dict[str, object]:
    """Commit, versions, device, CPU threads: what decides bits besides the configuration."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "commit": commit(),
        "versions": versions,
        "device": gpu or f"cpu {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's bytes at once; on any failure the old file stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, one for each row."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(path: Path, expected: str, names: Iterable[str]) -> list[Row]:
    """The rows of JSON lines, which hold at least these names. Raises AclaError: not `expected`."""
    with reading(path, expected):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not set(names) <= set.intersection(*map(set, rows)):
            raise ValueError("rows of something else")
        return rows


def clear_temporary(folder: Path) -> None:
    """Remove what killed writes left in a folder, which no other process may be writing to."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9]+\.tmp", path.name):
            path.unlink(missing_ok=True)
