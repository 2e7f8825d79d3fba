"""How long a call takes and how much memory it needs, fairly: contenders take turns."""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Clock:
    """Times calls: CUDA events on a GPU; processor time on one CPU thread, which other programs
    disturb least, else wall time."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.read = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, work: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if not self.cuda:
            start = self.read()
            work()
            return (self.read() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def paired(
    works: dict[str, Callable[[], object]], device: str, seconds: float, least: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each contender's calls, taken in turns until `seconds` have passed, at least
    `least` each, after one call that is not counted."""
    clock = Clock(device)
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    begun = time.monotonic()
    while time.monotonic() - begun < seconds or len(next(iter(times.values()))) < least:
        for name, work in works.items():
            times[name].append(clock(work))
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
    changes = [e["args"]["Bytes"] for e in events if e.get("name") == "[memory]"]
    return round(max(itertools.accumulate(changes, initial=0)) / 1e6, 2)
