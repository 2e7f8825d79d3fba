"""What the benchmark's rows say, a ratio a line, each beside the target it is to reach.

B batch · H,W grid · C channels
"""

from collections.abc import Iterator

Row = dict[str, object]
Key = tuple[int, int, int, int, str, float]  # B, H, W, C, pass, keep

FLOOR_SHARE = {"forward": 0.5, "backward": 0.35}
SPARSE_SHARE = 0.45  # time with a quarter of the keys, of that with all
DEFORM_CONV = 15
SUPERNET = 15
# Time with attention over time without; graphs are replayed on GPUs only.
NETWORKS = {
    ("cpu", "network", "edsr-32x256"): 1.06,
    ("cpu", "network", "edsr-16x64"): 1.25,
    ("cpu", "network", "rcan-10x20x64"): 1.05,
    ("cuda", "replay", "edsr-32x256"): 1.10,
    ("cuda", "replay", "edsr-16x64"): 1.10,
}


def grid_sample_target(device: str, backend: str, which: str, C: int) -> float | None:
    """How many times as fast as the better grid_sample a backend is to be."""
    match device, backend, which:
        case "cpu", "cpp", "forward":
            return 20 if C >= 128 else 15 if C >= 64 else None
        case "cpu", "cpp", "both":
            return 35
        case "cpu", "torch", "forward":
            return 5
        case "cpu", "torch", "both":
            return 8
        case "cuda", "triton", "forward":
            return 10
        case "cuda", "triton", "both":
            return 5
    return None


def at_least(value: float, target: float | None) -> str:
    """The target of a value that is to be large, and whether it is met; nothing without one."""
    if target is None:
        return ""
    return f" (target: {target:g} or more, {'met' if value >= target else 'missed'})"


def at_most(value: float, target: float | None) -> str:
    """The target of a value that is to be small; without one, only that less is better."""
    if target is None:
        return " (less is better)"
    return f" (target: {target:g} or less, {'met' if value <= target else 'missed'})"


def ratios(rows: list[Row]) -> list[str]:
    """Every line. A missing row leaves its lines out."""
    groups: dict[Key, dict[str, Row]] = {}
    for row in rows:
        key = (row["B"], row["H"], row["W"], row["C"], row["pass"], row["keep"])
        groups.setdefault(key, {})[row["backend"]] = row
    lines = []
    for key, group in groups.items():
        lines += speed_lines(key, group)
        lines += floor_lines(key, group, groups)
        lines += network_lines(group)
        lines += supernet_lines(group)
    return lines + list(sparsity_lines(rows))


def where(row: Row, which: str | None = None) -> str:
    """The size and the pass, as a line begins."""
    return f"{row['B']}×{row['H']}×{row['W']}, C {row['C']}, {which or row['pass']}"


def device_of(row: Row) -> str:
    return "cpu" if row["device"].startswith("cpu") else "cuda"


def speed_lines(key: Key, group: dict[str, Row]) -> Iterator[str]:
    """Our backends beside what users do today."""
    which = key[4]
    grid = [row["ms_p50"] for name, row in group.items() if name.startswith("grid_sample p")]
    for name in ("cpp", "torch", "triton"):
        if not grid or name not in group:
            continue
        row = group[name]
        ours, device = row["ms_p50"], device_of(row)
        times = min(grid) / ours
        line = f"{where(row)}: {name} is {times:.1f}× as fast as the better grid_sample"
        line += at_least(times, grid_sample_target(device, name, which, row["C"]))
        if "deform_conv2d" in group:
            times = group["deform_conv2d"]["ms_p50"] / ours
            target = DEFORM_CONV if (name, which) == ("triton", "forward") else None
            line += f", {times:.1f}× as deform_conv2d{at_least(times, target)}"
        yield f"{line}, {group['conv3x3']['ms_p50'] / ours:.2f}× as one 3×3 convolution"


def floor_lines(
    key: Key, group: dict[str, Row], groups: dict[Key, dict[str, Row]]
) -> Iterator[str]:
    """How near the Triton kernels come to the least time there can be. The backward pass is what
    both passes take beyond forward."""
    row = group.get("triton", {})
    if "floor_ms" not in row:
        return
    floor, time, which = row["floor_ms"], row["ms_p50"], "forward"
    if row["pass"] == "both":
        forward = groups.get((*key[:4], "forward", key[5]), {}).get("triton")
        if forward is None or forward["ms_p50"] >= time:
            return
        floor, time, which = floor - forward["floor_ms"], time - forward["ms_p50"], "backward"
    share = floor / time
    target = FLOOR_SHARE[which]
    yield (
        f"{where(row, which)}, {row['keep']:.0%} of the keys: triton reaches {share:.2f} of the "
        f"floor, {floor:.4f} ms{at_least(share, target)}"
    )


def network_lines(group: dict[str, Row]) -> Iterator[str]:
    """Whole networks with attention, of the time without."""
    for name, row in group.items():
        inserted = group.get(f"{name} + acla")
        if inserted is None:
            continue
        share = inserted["ms_p50"] / row["ms_p50"]
        how = " under graph replay" if row["pass"] == "replay" else ""
        target = NETWORKS.get((device_of(row), row["pass"], name))
        yield f"{name} + acla takes {share:.3f} of {name}'s time{how}{at_most(share, target)}"


def supernet_lines(group: dict[str, Row]) -> Iterator[str]:
    """Memory of a training step, of what grid_sample saves; what skipping shut modules saves."""
    computed = group.get("supernet step, half shut, all computed")
    skipped = group.get("supernet step, half shut, skipped")
    if computed and skipped:
        yield (
            "a supernet step with half of the gates shut takes "
            f"{skipped['ms_p50'] / computed['ms_p50']:.2f} of its time and "
            f"{skipped['peak_mb'] / computed['peak_mb']:.2f} of its memory where shut modules are "
            "skipped (less is better)"
        )
    step = group.get("supernet step")
    for name, row in group.items():
        if step and name.startswith("grid_sample, saved"):
            times = row["peak_mb"] / step["peak_mb"]
            met = "met" if times >= SUPERNET else "missed"
            yield (
                f"a supernet step needs 1/{times:.1f} of {name} (target: 1/{SUPERNET} or less, "
                f"{met})"
            )


def sparsity_lines(rows: list[Row]) -> Iterator[str]:
    """Time with a quarter of the keys kept over time with all."""
    for row in rows:
        if row["keep"] <= 0.99 or row["pass"] not in ("forward", "both"):
            continue
        for other in rows:
            same = all(row[k] == other[k] for k in ("B", "H", "W", "C", "backend", "pass"))
            if same and other["keep"] < 0.3 and row["ms_p50"]:
                share = other["ms_p50"] / row["ms_p50"]
                yield (
                    f"{where(row)}: {row['backend']} with {other['keep']:.0%} of the keys takes "
                    f"{share:.2f} of its time with all{at_most(share, SPARSE_SHARE)}"
                )
