"""Cross-layer attention's operator, and every way to compute it."""

from .dispatch import BACKENDS, why_not
from .ops import Attended, attend, attend_module, runs_whole, to_rows
from .philox import logistic_noise
from .reference import binary_gate

__all__ = [
    "BACKENDS",
    "Attended",
    "attend",
    "attend_module",
    "binary_gate",
    "logistic_noise",
    "runs_whole",
    "to_rows",
    "why_not",
]
