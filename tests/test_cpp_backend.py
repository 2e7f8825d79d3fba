"""The CPU backends against the float64 reference: results, every gradient, bits; and refusals.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

import itertools
import math
import platform
import shutil

import operator_cases
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operator_cases import Inputs, far_apart, gate_terms, make, make_clear, sparse_memory
from torch import Tensor

from acla.kernels import (
    attend,
    attend_module,
    cpp_backend,
    dispatch,
    logistic_noise,
    to_rows,
    torch_backend,
)

BACKENDS = ["cpp", "torch"]
TYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = dispatch.why_not(request.param, torch.zeros(1))
    if reason:
        pytest.skip(reason)
    return request.param


def error(result: Tensor, exact: Tensor) -> float:
    assert result.shape == exact.shape
    assert result.isfinite().all()
    return (result.double() - exact).abs().max().item()


def judge(backend: str, inputs: Inputs, dtype: torch.dtype) -> None:
    """No result and no gradient may be farther from the exact one than the reference in the same
    type is, but for a few roundings of the largest value; of the largest term where the terms may
    cancel."""
    exact = inputs.to(torch.float64).run("reference")
    peer = exact if dtype == torch.float64 else inputs.to(dtype).run("reference")
    result = inputs.to(dtype).run(backend)
    assert result.keys() == exact.keys()
    # The noise is float32 in every type, and a logarithm's last bit is the machine's.
    eps = torch.finfo(torch.float32 if inputs.seeds is not None else dtype).eps
    eps = max(eps, torch.finfo(dtype).eps)
    assert torch.equal(result["kept"], exact["kept"])
    for name, value in exact.items():
        assert result[name].dtype == peer[name].dtype, name
        largest = gate_terms(inputs) if name == "∂gates" else value.abs().max().item()
        allowed = error(peer[name], value) + 8 * eps * largest
        assert error(result[name], value) <= allowed, name


# ---- against the reference

SIZES = [  # B, H, W, L, K, C
    pytest.param((1, 1, 1, 1, 1, 1), id="one-pixel-one-of-everything"),
    pytest.param((2, 9, 17, 2, 3, 19), id="off-the-tile-odd-C"),
    pytest.param((1, 3, 2, 3, 17, 5), id="K17"),
    pytest.param((1, 1, 13, 2, 3, 16), id="one-row-C16"),
    pytest.param((2, 11, 2, 5, 2, 3), id="two-columns-L5-C3"),
    pytest.param((1, 8, 8, 1, 8, 64), id="one-tile-L1-K8-C64"),
    pytest.param((1, 10, 9, 1, 16, 96), id="K16-C96"),
    pytest.param((1, 3, 5, 1, 4, 300), id="many-channels-and-a-rest"),
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(backend, size, dtype):
    judge(backend, make_clear(size, gates=[1.0] * size[3]), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"masks": False}, id="no-masks"),
        pytest.param({"mask_sign": -1}, id="all-masked"),
        pytest.param({"mask_sign": 1}, id="all-kept"),
        pytest.param({"deviation": 40.0}, id="far-outside"),
        pytest.param({"seeds": True}, id="noise"),
        pytest.param({"seeds": True, "gates": [0.0, 1.0, 0.0]}, id="noise-and-closed-gates"),
        pytest.param({"masks": False, "gates": [1.0, 0.0, 0.5]}, id="gates-without-masks"),
    ],
)
def test_options(backend, options, dtype):
    judge(backend, make_clear((2, 6, 11, 3, 5, 7), **options), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_whole_offsets_take_the_reference_s_side_of_every_kink(backend, dtype):
    inputs = make((2, 5, 6, 2, 4, 5))
    inputs.mask_maps = [m + 1 / 512 for m in inputs.mask_maps]  # never 0
    inputs.points[..., :2, :] = (inputs.points[..., :2, :] * 3).round()
    judge(backend, inputs, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_positions_that_are_no_numbers(backend, dtype):
    inputs = make_clear((2, 5, 6, 2, 6, 5))
    wrong = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.5])
    inputs.points[..., 0, :] = wrong
    inputs.points[..., 1, :] = wrong.roll(1)
    judge(backend, inputs, dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(TYPES), backend=st.sampled_from(BACKENDS))
def test_random_shapes(data, dtype, backend):
    assume(dispatch.why_not(backend, torch.zeros(1)) is None)
    limits = {"B": 2, "H": 11, "W": 11, "L": 2, "K": 4, "C": 40}
    size = tuple(data.draw(st.integers(1, limit), label=name) for name, limit in limits.items())
    inputs = make(
        size,
        deviation=data.draw(st.sampled_from([0.3, 2.0, 9.0]), label="deviation"),
        masks=data.draw(st.booleans(), label="masks"),
        gates=data.draw(
            st.none() | st.lists(st.sampled_from([0.0, 1.0]), min_size=size[3], max_size=size[3]),
            label="gates",
        ),
        seeds=data.draw(st.booleans(), label="seeds"),
        seed=data.draw(st.integers(0, 1 << 20), label="seed"),
    )
    assume(operator_cases.margin(inputs) > 1e-5)
    judge(backend, inputs, dtype)


@pytest.mark.parametrize("size", [(1, 1, 2, 2, 2, 1), (2, 3, 2, 1, 3, 2)], ids=["1x2", "3x2"])
def test_gradients_against_differences(backend, size):
    inputs = make(size, masks=False, gates=[0.5] * size[3])
    leaves = list(inputs.leaves().values())
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: tuple(inputs.attend(backend))[:2], leaves)


def test_half_precision_and_mixed_types(backend):
    inputs = make_clear((1, 4, 5, 2, 3, 6), around=1e-2)
    inputs.features = [f.half() for f in inputs.features]
    inputs.points, inputs.mask_maps = inputs.points.float(), [m.half() for m in inputs.mask_maps]
    result = inputs.run(backend)
    exact = inputs.to(torch.float64).run("reference")
    assert result["aggregate"].dtype == torch.half
    assert result["∂mask_maps[1]"].dtype == torch.half
    for name, value in exact.items():
        assert error(result[name], value) <= 4 * torch.finfo(torch.half).eps * value.abs().max()


def test_noise_is_the_reference_s(backend):
    # A mask a hair above and below the noise's opposite opens and closes exactly there.
    L, K, seeds = 3, 7, torch.tensor([3, -(2**61) - 12345])
    noise = logistic_noise(seeds, L * K).view(2, 1, 1, L, K)
    for hair, kept in ((1e-5, K), (-1e-5, 0)):
        maps = [(hair - noise[..., l, :]).expand(2, 3, 3, K) for l in range(L)]
        points, rows = torch.zeros(2, 1, 1, L, 3, K), [torch.zeros(2, 3, 3, 1)] * L
        assert (attend(rows, points, maps, seeds=seeds, backend=backend).kept == kept).all()


@pytest.fixture(params=["-mno-avx512f", "-mno-avx512bf16"])
def other_processor(request, tmp_path, monkeypatch):
    """The C++ kernel compiled, into a cache of its own, for a processor without AVX-512, or without
    its products of bfloat16."""
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("g++"):
        pytest.skip("this is about g++ on x86-64")
    monkeypatch.setenv("CXX", f"g++ {request.param}")
    monkeypatch.setenv("ACLA_CACHE", str(tmp_path))
    cpp_backend.library.cache_clear()
    assert not isinstance(cpp_backend.library(), str), cpp_backend.library()
    yield
    monkeypatch.undo()
    cpp_backend.library.cache_clear()


def test_other_processors_vectors_are_right_too(other_processor):
    for size in ((2, 9, 17, 2, 3, 19), (1, 3, 2, 3, 17, 5), (1, 3, 5, 1, 4, 300)):
        for dtype in TYPES:
            judge("cpp", make_clear(size, gates=[1.0] * size[3], seeds=True), dtype)
    for size, dtype in itertools.product(MODULES, TYPES):
        judge_module(size, dtype)


MODULES = ((2, 3, 9, 2, 5, 20), (1, 9, 2, 1, 16, 64))  # B, H, W, L, K, C


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", MODULES)
def test_a_module_of_a_view(size, dtype):
    if reason := dispatch.why_not("cpp", torch.zeros(1)):
        pytest.skip(reason)
    judge_module(size, dtype)


def test_a_module_refuses_what_does_not_fit():
    rows, query = [torch.zeros(1, 4, 5, 3)], torch.zeros(1, 2, 3, 3)
    given = torch.zeros(3, 12), torch.zeros(12), None, None, torch.zeros(1, 4, 3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"features must be \[\[1, 4, 6, 3\]\]"):
        attend_module(torch.zeros(1, 2, 4, 3), rows, *given)
    masks = torch.zeros(1, 3, 4), torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"mask_bias must be \[1, 4\], not \[1, 3\]"):
        attend_module(query, rows, *given[:2], *masks, *given[4:])
    with pytest.raises(ValueError, match="even number of channels, not 3"):
        attend_module(query.bfloat16(), [rows[0].bfloat16()], *given)


def judge_module(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """`attend_module` of a view, without masks, beside the reference in float64 and products."""
    B, H, W, L, K, C = size
    rows = [to_rows(torch.randn(B, C, H, W)).to(dtype) for _ in range(L)]
    query = torch.randn(B, H + 1, W + 2, C + 2).to(dtype)[:, 1:, :W, :C]
    weight = torch.randn(C, L * 3 * K) / 9
    bias, output = torch.randn(L * 3 * K), torch.randn(L, C + 1, C)
    given = query, rows, weight, bias, None, None, output, torch.zeros(C)
    points = (query.double() @ weight.double() + bias).view(B, H, W, L, 3, K)
    out = attend([one.double() for one in rows], points, backend="reference")
    expected = query.double() + out.aggregate.flatten(3) @ output[:, :-1].flatten(0, 1).double()
    expected = expected + out.coverage @ output[:, -1].double()
    tolerance = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
    found = attend_module(*given)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


# ---- layouts, subsets, work left out


def test_views_give_the_bits_of_contiguous_tensors(backend):
    expected = make_clear((2, 7, 5, 2, 3, 20)).to(torch.float32).run(backend)
    inputs = make_clear((2, 7, 5, 2, 3, 20)).to(torch.float32)
    inputs.features = [torch.cat([f, f * math.nan], -1)[..., :20] for f in inputs.features]
    inputs.mask_maps = [m.transpose(1, 3).contiguous().transpose(1, 3) for m in inputs.mask_maps]
    assert inputs.features[0].stride() == (9 * 7 * 40, 7 * 40, 40, 1)
    assert inputs.mask_maps[0].stride(-1) != 1
    inputs.points = inputs.points.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    for name, value in inputs.run(backend).items():
        assert torch.equal(value, expected[name]), name


def test_what_lies_far_apart_gives_the_bits_of_what_is_near(backend, tmp_path):
    inputs = make_clear((2, 2, 3, 2, 3, 20), seeds=True).to(torch.float32)
    expected = inputs.run(backend)
    far = far_apart(inputs, sparse_memory(tmp_path / "memory"))
    for name, value in far.run(backend).items():
        assert torch.equal(value, expected[name]), name


def test_expanded_gradients(backend):
    inputs = make_clear((1, 4, 5, 2, 3, 6)).to(torch.float32)
    inputs.cotangents = [torch.ones(()).expand(c.shape) for c in inputs.cotangents]
    result = inputs.run(backend)
    for name, value in inputs.run("reference").items():
        torch.testing.assert_close(result[name], value)


@pytest.mark.parametrize(
    "wanted",
    [{"features[1]"}, {"points"}, {"mask_maps[0]"}, {"gates"}, {"features[0]", "gates"}, set()],
    ids=lambda wanted: "+".join(sorted(wanted)) or "none",
)
@pytest.mark.parametrize("gates", [[1.0, 1.0], [0.0, 1.0]], ids=["open", "one-closed"])
def test_only_the_gradients_wanted(backend, wanted, gates):
    inputs = make_clear((2, 4, 9, 2, 3, 6), gates=gates).to(torch.float32)
    expected = inputs.run("reference", wanted)
    result = inputs.run(backend, wanted)
    for name, value in expected.items():
        if value is None:
            assert result[name] is None
        else:
            torch.testing.assert_close(result[name], value)


@pytest.mark.parametrize("result", ["aggregate", "coverage", "kept"])
def test_a_loss_of_one_result_alone(backend, result):
    inputs = make_clear((2, 4, 9, 2, 3, 6), gates=[0.0, 1.0])
    leaves = inputs.leaves()
    for leaf in leaves.values():
        leaf.requires_grad_()
    grads = []
    for name in ("reference", backend):
        value = getattr(inputs.attend(name), result)
        grads.append(
            torch.autograd.grad((value**2).sum(), list(leaves.values()), allow_unused=True)
        )
    for name, expected, grad in zip(leaves, *grads, strict=True):
        expected = torch.zeros_like(grad) if expected is None else expected
        torch.testing.assert_close(grad, expected, msg=lambda m, n=name: n + m)


def test_nothing_is_saved_where_no_gradient_is_wanted(backend):
    inputs = make((1, 3, 3, 1, 2, 2))
    assert inputs.attend(backend).aggregate.grad_fn is None


def test_first_order_only(backend):
    inputs = make((1, 3, 3, 1, 2, 2), masks=False)
    inputs.points.requires_grad_()
    out = inputs.attend(backend).aggregate.sum()
    (first,) = torch.autograd.grad(out, inputs.points, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only; 'reference' has the rest"):
        first.square().sum().backward()


def test_a_closed_layer_is_not_read(backend):
    inputs = make_clear((1, 4, 5, 2, 3, 6), gates=[0.0, 1.0])
    inputs.features[0].fill_(math.nan)
    result = inputs.run(backend, {"features[0]", "features[1]", "points", "mask_maps[0]"})
    assert not result["aggregate"][..., 0, :].any()
    assert not result["∂features[0]"].any()
    assert all(value.isfinite().all() for value in result.values() if value is not None)


def test_masked_keys_are_not_read(backend):
    inputs = make((1, 6, 6, 1, 2, 3))
    inputs.points[..., :2, :] = 0.25
    inputs.mask_maps[0].fill_(1.0)
    inputs.mask_maps[0][:, :3], inputs.features[0][:, :3] = -1.0, math.nan
    read = inputs.attend(backend).aggregate[:, 2:]
    assert read.isfinite().all()
    assert read.any()


# ---- bits and memory


def test_bits_do_not_depend_on_threads_or_runs(backend):
    inputs = make_clear((3, 17, 19, 2, 5, 24), gates=[1.0, 0.0], seeds=True).to(torch.float32)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            runs.append(inputs.run(backend))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, other[name]), name


def test_pure_torch_does_not_depend_on_its_chunks(monkeypatch):
    inputs = make_clear((2, 9, 7, 2, 3, 6), seeds=True, gates=[1.0, 0.0])
    whole = inputs.run("torch")
    monkeypatch.setattr(torch_backend, "CHUNK", 32)
    for name, value in inputs.run("torch").items():
        torch.testing.assert_close(value, whole[name])


# ---- what is refused


def points() -> Tensor:
    return torch.zeros(1, 1, 1, 1, 3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "points is for 1 layers, but there are 0 features"),
        ({"features": [torch.zeros(1, 3, 4, 2)]}, r"features\[0\] must be \[1, 3, 3, 2\], not"),
        ({"features": [torch.zeros(1, 3, 3, 2).int()]}, "must be floating point"),
        ({"points": torch.zeros(1, 1, 1, 3, 1)}, "points must be"),
        ({"points": torch.zeros(1, 0, 1, 1, 3, 1)}, "points must not be empty"),
        ({"mask_maps": [torch.zeros(1, 3, 3, 4)]}, r"mask_maps\[0\] must be \[1, 3, 3, 1\]"),
        ({"gates": torch.zeros(2)}, r"gates must be \[1\]"),
        ({"seeds": torch.zeros(1)}, "seeds must be int64"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {"features": [torch.zeros(1, 3, 3, 2)], "points": points()} | change
    with pytest.raises(ValueError, match=message):
        attend(**arguments)


def test_layers_of_different_types_are_refused():
    layers = [torch.zeros(1, 3, 3, 2), torch.zeros(1, 3, 3, 2).double()]
    with pytest.raises(ValueError, match=r"features\[1\] is torch.float64, but features\[0\]"):
        attend(layers, points().expand(1, 1, 1, 2, 3, 1))
