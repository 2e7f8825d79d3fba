"""The choice of a backend, with its reason."""

import functools
import logging
from collections.abc import Sequence

from torch import Tensor

BACKENDS = ("reference", "torch", "cpp", "triton")  # that `backend=` takes besides "auto"
FASTEST = {
    "cpu": ("cpp", "it is the fastest on CPUs"),
    "cuda": ("triton", "it is the fastest on GPUs"),
}

logger = logging.getLogger(__name__)


def choose_backend(backend: str, points: Tensor, features: Sequence[Tensor] = ()) -> str:
    """The backend to run; a named one is refused with the reason, never replaced by another."""
    if backend == "auto":
        return fastest_backend(points, features)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    reason = why_not(backend, points, features)
    if reason:
        raise RuntimeError(f"backend={backend!r} refused: {reason}")
    return backend


def fastest_backend(points: Tensor, features: Sequence[Tensor] = ()) -> str:
    """What "auto" takes for tensors like this; says so once."""
    best, why = FASTEST.get(points.device.type, ("torch", "nothing faster runs on this device"))
    reason = why_not(best, points, features)
    if reason is None:
        log_choice(logging.INFO, best, why)
        return best
    log_choice(logging.WARNING, "torch", f"{best}, which is faster, was refused: {reason}")
    return "torch"


@functools.cache
def log_choice(level: int, backend: str, reason: str) -> None:
    """Log, once a process, what "auto" took and why."""
    logger.log(level, "backend='auto' took %r: %s", backend, reason)


def why_not(backend: str, points: Tensor, features: Sequence[Tensor] = ()) -> str | None:
    """None where the backend runs on these tensors, else the reason why it does not."""
    match backend:
        case "cpp":
            from . import cpp_backend

            return cpp_backend.why_not_cpp(points)
        case "triton":
            from . import triton_backend

            return triton_backend.why_not_triton(points, features)
    return None
