"""Cross-layer attention's operator, and every way to compute it."""

from kernels.ops import Attended, attend, available_backends, to_rows, why_not
from kernels.reference import binary_gate, logistic_noise

__all__ = [
    "Attended",
    "attend",
    "available_backends",
    "binary_gate",
    "logistic_noise",
    "to_rows",
    "why_not",
]
