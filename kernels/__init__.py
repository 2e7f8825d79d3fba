"""Cross-layer attention's operator, and every way to compute it."""

from .dispatch import available_backends, why_not
from .ops import Attended, attend, to_rows
from .philox import logistic_noise
from .reference import binary_gate

__all__ = [
    "Attended",
    "attend",
    "available_backends",
    "binary_gate",
    "logistic_noise",
    "to_rows",
    "why_not",
]
