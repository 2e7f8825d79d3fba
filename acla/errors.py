"""The errors a user can mend. The scripts print their message in one line; anything else is a bug
and keeps its traceback."""

import torch

# What reading somebody's JSON as something may raise
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


NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on the GPU or not."""
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop has written its state. `status` is its exit status, as a shell
    tells the signal."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.status = 128 + number
