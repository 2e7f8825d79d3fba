"""Standard output and error of a command that somebody reads, or nobody."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def run(main: Callable[..., Any], *arguments: Any) -> Any:
    """What `main` returns. Output that nobody reads any more (`| head -1`) ends the command
    quietly, with the status that a shell gives for that; closed output (`>&-`) is thrown away."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # terminals without σ
    try:
        try:
            return main(*arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes both once more when it ends
            os.dup2(nowhere, stream.fileno())
        sys.exit(128 + signal.SIGPIPE)
