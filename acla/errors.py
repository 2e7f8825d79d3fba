"""The errors a user can mend. The scripts print their message in one line; anything else is a bug
and keeps its traceback."""

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
