"""The operator as torch knows it: opcheck, compilation, export, FLOPs, shapes without data."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acla.kernels import attend, attend_module, to_rows, why_not

B, L, K, H, W, C = 2, 3, 4, 5, 4, 8


def inputs(masked: bool = True) -> tuple:
    torch.manual_seed(0)
    features = [to_rows(torch.randn(B, C, H, W)).requires_grad_() for _ in range(L)]
    points = torch.randn(B, H, W, L, 3, K, requires_grad=True)
    maps = [torch.randn(B, H + 2, W + 2, K, requires_grad=True) for _ in range(L if masked else 0)]
    gates = torch.tensor([1.0, 0.0, 1.0], requires_grad=True)
    return features, points, maps, gates


def total(features, points, maps, gates, backend="torch"):
    seeds = torch.arange(B)
    out = attend(features, points, maps or None, gates, seeds=seeds, backend=backend)
    return out.aggregate.sum() * 2 + out.coverage.square().sum() + out.kept.sum()


@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked):
    features, points, maps, gates = inputs(masked)
    for counts in (True, False):
        given = (features, points, maps, gates, torch.arange(B), 1.0, "torch", counts)
        result = torch.library.opcheck(torch.ops.acla.attend.default, given)
        assert set(result.values()) == {"SUCCESS"}


def test_opcheck_of_rows():
    feature = torch.randn(B, C, H, W, requires_grad=True)
    result = torch.library.opcheck(torch.ops.acla.to_rows.default, (feature,))
    assert set(result.values()) == {"SUCCESS"}
    rows = torch.ops.acla.to_rows(feature)
    assert torch.equal(rows, to_rows(feature))
    sent = torch.randn_like(rows)
    ours, theirs = (torch.autograd.grad(r, feature, sent) for r in (rows, to_rows(feature)))
    assert torch.equal(*ours, *theirs)


@pytest.mark.skipif(bool(why_not("cpp", torch.zeros(1))), reason="no C++ compiler")
@pytest.mark.parametrize("masked", [True, False])
def test_a_module_in_one_pass_has_its_shape_and_the_flops_of_its_parts(masked):
    rows = [f.detach() for f in inputs()[0]]
    query, columns = torch.randn(B, H, W, C), L * 3 * K
    weight, output = torch.randn(C, columns), torch.randn(L, C + 1, C)
    masks = (torch.randn(L, C, K), torch.randn(L, K)) if masked else (None, None)
    given = query, rows, weight, torch.randn(columns), *masks, output, torch.randn(C)
    result = torch.library.opcheck(torch.ops.acla.attend_module.default, given)
    assert set(result.values()) == {"SUCCESS"}
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        attend_module(*given)
    with torch.no_grad(), FlopCounterMode(display=False) as parts:
        points = (query @ weight).view(B, H, W, L, 3, K)
        maps = [one @ mask for one, mask in zip(rows, masks[0], strict=True)] if masked else None
        out = attend(rows, points, maps)
        out.aggregate.flatten(3) @ output[:, :-1].flatten(0, 1)
        out.coverage @ output[:, -1]
    assert whole.get_total_flops() == parts.get_total_flops()


def test_counts_are_left_out_where_they_are_not_wanted():
    features, points, maps, gates = inputs()
    leaves = [*features, points, *maps, gates]
    for backend in ("torch", "cpp", "reference"):
        runs = [
            attend(features, points, maps, gates, backend=backend, counts=counts)
            for counts in (True, False)
        ]
        assert runs[1].kept is None
        totals = [run.aggregate.sum() + run.coverage.square().sum() for run in runs]
        ours, theirs = (torch.autograd.grad(total, leaves) for total in totals)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_compiled_whole_and_equal():
    features, points, maps, gates = inputs()
    leaves = [*features, points, *maps, gates]
    plain = torch.autograd.grad(total(features, points, maps, gates), leaves)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(features, points, maps, gates), leaves)
    for ours, theirs in zip(traced, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_exported():
    class Module(torch.nn.Module):
        def forward(self, features, points):
            return attend(features, points).aggregate

    features, points, _, _ = inputs()
    features, points = [f.detach() for f in features], points.detach()
    program = torch.export.export(Module(), (features, points))
    torch.testing.assert_close(program.module()(features, points), Module()(features, points))


def test_flops_are_those_of_the_aggregation():
    features, points, maps, gates = inputs()
    with FlopCounterMode(display=False) as counter:
        attend(features, points, maps, gates).aggregate.sum().backward()
    forward = 6 * C * B * H * W * L * K
    assert counter.get_total_flops() == 3 * forward


def test_shapes_need_no_data():
    features = [torch.empty(B, H + 2, W + 2, C, device="meta", dtype=torch.bfloat16)] * L
    points = torch.empty(B, H, W, L, 3, K, device="meta", requires_grad=True)
    out = attend(features, points)
    assert out.aggregate.shape == (B, H, W, L, C)
    assert out.aggregate.dtype == torch.bfloat16
    assert out.coverage.shape == (B, H, W, L)
    assert (out.kept.shape, out.kept.dtype) == ((B, L), torch.float64)
    out.aggregate.sum().backward()
    assert points.grad.shape == points.shape
