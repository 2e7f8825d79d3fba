"""Errors that a user can mend: the scripts print their message in one line. Any other error is a
bug and keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Errors of reading JSON of unknown origin
NOT_VALID = (KeyError, ValueError, TypeError, OverflowError, RecursionError)


class AclaError(Exception):
    """The work failed; the message names the cause and the fix. Exit status 1."""


class UsageError(AclaError):
    """The call was wrong (an impossible flag, an unknown value). Exit status 2."""


class PictureError(AclaError):
    """A picture cannot be read or written; the message names the file."""


class DataError(AclaError):
    """A set of pictures is missing, empty or does not fit its task."""


class CheckpointError(AclaError):
    """A checkpoint is missing, broken, of another kind or of another network."""


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """A context for reading a JSON file of unknown origin. Raises AclaError: not `expected`."""
    try:
        yield
    except (UsageError, AttributeError, *NOT_VALID) as error:
        raise AclaError(f"{path}: not {expected}: {error!r}") from error


def one_line(cause: object) -> str:
    """An error's reason, or a text from a file, without line breaks."""
    return " ".join((getattr(cause, "strerror", None) or str(cause) or repr(cause)).split())


NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on the GPU or not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


class Stopped(KeyboardInterrupt):
    """A run stopped by a signal, with its state written. status: of the exit, as in a shell."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.status = 128 + number
