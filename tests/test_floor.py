"""The floor of the operator on GPUs: the counts by hand, and what they take on a known GPU."""

from types import SimpleNamespace

import pytest
import torch

from acla.kernels import floor
from acla.kernels.floor import Gpu, Work

# B, L, K, H, W, C, share of keys kept: 40 queries, 120 keys, 60 kept; 2·6·7 = 84 pixels with their
# borders. A pixel has 8 channels and 3 mask values, a query 3·3 numbers for its keys.
SIZE = (1, 2, 3, 4, 5, 8, 0.5)
WIDE = 84 * (8 * 4 + 3 * 4) + 40 * 9 * 4  # bytes of features, mask maps and points
NARROW = 84 * (8 * 2 + 3 * 4) + 40 * 9 * 4

H100 = {"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32}
CLOCKS = {"sm_clock_rate": 1_980_000, "mem_clock_rate": 2_619_000, "mem_bus_width": 5120}


def test_forward_by_hand():
    assert floor.forward_work(*SIZE, torch.float32) == Work(
        bytes=WIDE + 40 * 8 * 4 + 40 * 4 + 2 * 8,  # and aggregate, coverage, kept
        flops=60 * 8 * 6,
        gathered=60 * 4 * 8 * 4,
        instructions=60 * 4 * (8 + 2),  # at a corner 8 multiply-adds and 2 loads of 4 values
    )
    assert floor.forward_work(*SIZE, torch.bfloat16) == Work(
        bytes=NARROW + 40 * 8 * 2 + 40 * 4 + 2 * 8,
        flops=60 * 8 * 6,
        gathered=60 * 4 * 8 * 2,
        instructions=60 * 4 * (8 + 8 + 1),  # 8 conversions too, and one load of 8 values
    )


def test_backward_by_hand():
    assert floor.backward_work(*SIZE, torch.float32) == Work(
        bytes=2 * WIDE + 40 * 8 * 4,  # inputs and their gradients, and the aggregate's
        flops=(120 + 60) * 8 * 6,
        gathered=(120 + 60) * 4 * 8 * 4,
        instructions=120 * 4 * (8 + 2) + 60 * 4 * (8 + 2),  # 8 products and 2 additions of 4
    )
    assert floor.backward_work(*SIZE, torch.float16) == Work(
        bytes=2 * NARROW + 40 * 8 * 2,
        flops=(120 + 60) * 8 * 6,
        gathered=(120 + 60) * 4 * 8 * 2,
        instructions=120 * 4 * (8 + 8 + 1) + 60 * 4 * (8 + 2),
    )


def test_flops_are_those_that_torch_counts_when_every_key_is_kept():
    from acla.kernels.registration import attend_backward_flops, attend_flops

    every = (*SIZE[:-1], 1.0, torch.float32)
    shapes = [(1, 6, 7, 8)] * 2, (1, 4, 5, 2, 3, 3)
    assert floor.forward_work(*every).flops == attend_flops(*shapes)
    assert floor.backward_work(*every).flops == attend_backward_flops(*shapes)


@pytest.mark.parametrize("limit", Gpu._fields)
def test_the_slowest_resource_of_each_pass_counts(limit):
    gpu = Gpu(1e30, 1e30, 1e30)._replace(**{limit: 1e3})
    passes = floor.works(*SIZE, torch.float32, "both")
    field = {"memory": "bytes", "cache": "gathered", "lanes": "instructions"}[limit]
    assert floor.floor_ms(passes, gpu) == pytest.approx(sum(getattr(w, field) for w in passes))
    assert floor.floor_ms(passes[:1], gpu) == pytest.approx(getattr(passes[0], field))


def test_both_is_forward_and_then_backward():
    forward, backward = floor.works(*SIZE, torch.float32, "both")
    assert (forward,) == floor.works(*SIZE, torch.float32, "forward")
    assert backward == floor.backward_work(*SIZE, torch.float32)


@pytest.fixture
def gpu_of(monkeypatch):
    """`floor.gpu_of` of a GPU that is not there."""
    runtime = pytest.importorskip("triton.runtime", reason="Triton is not installed")

    def of(properties=(), clocks=CLOCKS):
        found = SimpleNamespace(**{**H100, **dict(properties)})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        utils = SimpleNamespace(get_device_properties=lambda index: clocks)
        driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
        monkeypatch.setattr(runtime, "driver", driver)
        return floor.gpu_of(torch.device("cuda", 0))

    return of


def test_an_h100_s_floor(gpu_of):
    gpu = gpu_of()
    assert gpu.memory == pytest.approx(3.352e12, rel=1e-3)  # as NVIDIA states: 3.35 TB/s
    assert gpu.lanes * 2 == pytest.approx(66.9e12, rel=1e-3)  # 67 TFLOPS by multiply-adds
    work = floor.forward_work(1, 5, 16, 48, 48, 256, 1.0, torch.bfloat16)
    assert work.gathered == 2304 * 80 * 4 * 512
    assert work.gathered / gpu.cache == pytest.approx(11.28e-6, rel=1e-3)
    instructions = 2304 * 80 * 4 * (256 + 256 + 32)
    assert floor.floor_ms([work], gpu) == pytest.approx(instructions / (132 * 128 * 1.98e6))


@pytest.mark.parametrize(
    ("properties", "clocks", "reason"),
    [
        ({"major": 12}, CLOCKS, "no limits are known for H100"),
        ({}, CLOCKS | {"sm_clock_rate": 0}, "no clocks"),
        ({}, {"sm_clock_rate": 1}, "mem_clock_rate"),
    ],
    ids=["another-architecture", "no-clock", "no-memory-clock"],
)
def test_an_unknown_limit_has_its_reason(gpu_of, properties, clocks, reason):
    with pytest.raises(LookupError, match=reason):
        gpu_of(properties, clocks)


def test_an_amd_gpu_with_the_same_numbers_is_unknown(gpu_of, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(LookupError, match="no limits"):
        gpu_of()
