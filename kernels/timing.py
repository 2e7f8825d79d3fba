"""Time and memory of calls that take turns: the state of the machine is the same for all."""

import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# Clock cycles, some 20 ms, in which any implementation has launched nearly all of its kernels.
QUEUE = 40_000_000


def commit() -> str:
    """The commit of this code, '+' after it if files differ; 'unknown' outside a repository."""
    here = Path(__file__).parent
    command = ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Clock:
    """Times calls: CUDA events on a GPU, processor time on one CPU thread, else wall time.

    On a GPU, `queued` calls are timed without their launches: all kernels wait in line before the
    first one starts, with a cold L2 cache, as in a network whose other layers have filled it."""

    def __init__(self, device: str, queued: bool = False):
        self.cuda, self.queued = device == "cuda", queued and device == "cuda"
        self.read = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        if self.queued:
            size = 2 * torch.cuda.get_device_properties().L2_cache_size
            self.evict = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if not self.cuda:
            start = self.read()
            work()
            return (self.read() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.queued:
            self.evict.zero_()
            torch.cuda._sleep(QUEUE)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def paired(
    works: Sequence[Callable[[], object]],
    device: str,
    seconds: float,
    least: int = 3,
    queued: bool = False,
) -> list[list[float]]:
    """Milliseconds of each work's calls, taken in turns until `seconds` have passed, at least
    `least` each, after one call that is not counted."""
    clock = Clock(device, queued)
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    begun = time.monotonic()
    while time.monotonic() - begun < seconds or len(times[0]) < least:
        for work, taken in zip(works, times, strict=True):
            taken.append(clock(work))
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile in milliseconds."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    middle = statistics.median(times)
    named = zip(("ms_p20", "ms_p50", "ms_p80"), (fifths[0], middle, fifths[3]), strict=True)
    return {name: round(value, 4) for name, value in named}


def peak_mb(work: Callable[[], object], device: str) -> float:
    """Megabytes that torch had allocated at most during one call, beyond what it had before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 2)
    return round(max(itertools.accumulate(allocations(work), initial=0)) / 1e6, 2)


def allocations(work: Callable[[], object]) -> list[int]:
    """Bytes on the CPU that torch took or, negative, gave back during one call, in order."""
    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    profile.start()
    work()
    profile.stop()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]
