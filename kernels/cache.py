"""The folder of the compiled C++ kernel and of tile sizes; whether files can be written."""

import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """$ACLA_CACHE, else `acla` in the user's cache directory; a place where nothing can be kept if
    the user has no home. The folder need not exist."""
    if os.environ.get("ACLA_CACHE"):
        return Path(os.environ["ACLA_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"], "acla")
    home = os.path.expanduser("~")
    return Path(os.devnull if home == "~" else home, ".cache", "acla")


def is_writable(directory: Path) -> bool:
    """Whether files can be made in the directory, which is created if need be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def why_not_written(path: str | None) -> str | None:
    """None where a result can be written to this file (None, or "-": to standard output), else the
    reason and the fix."""
    if path in (None, "-") or (Path(path).parent.is_dir() and not Path(path).is_dir()):
        return None
    if Path(path).is_dir():
        return "that is a folder; name a file in it"
    return f"there is no folder {Path(path).parent}"
