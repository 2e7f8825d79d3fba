"""Cross-layer attention's operator, and every way to compute it."""

from .dispatch import available_backends, why_not
from .ops import Attended, attend, attend_module, runs_whole, to_rows
from .philox import logistic_noise
from .reference import binary_gate

__all__ = [
    "Attended",
    "attend",
    "attend_module",
    "available_backends",
    "binary_gate",
    "logistic_noise",
    "runs_whole",
    "to_rows",
    "why_not",
]
