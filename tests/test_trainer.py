"""One step of training: clipping, number formats, compiling, averages; and all of it resumed."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from acla.config import ATTENTIONS, ModelConfig, TrainConfig
from acla.distributed import Processes
from acla.errors import AclaError, CheckpointError, UsageError
from acla.training import step_graph, trainer
from acla.training.trainer import Trainer

CPU = torch.device("cpu")
ALONE = Processes(CPU)
PLAIN = ModelConfig(attention="none", keys=0, blocks=2, width=4, channels=1)
CONFIG = TrainConfig(batch_size=2, lr=1e-2)


def step(one: Trainer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    low = torch.rand(2, 1, 9, 7, generator=generator).to(one.device)
    one.step(number, range(2), low, low.roll(1, 3))


def same(one: Trainer, other: Trainer) -> bool:
    (a, values), (b, others) = one.state(), other.state()
    return a.keys() == b.keys() and values == others and all(torch.equal(a[n], b[n]) for n in a)


class Transfers(TorchDispatchMode):
    """Refuses blocking copies to or from the meta device, which stands for a GPU: reading a value
    of it raises already."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[-1] if func is torch.ops.aten.copy_.default else args[0]
            apart = source.device != out.device
            assert not apart or (kwargs or {}).get("non_blocking"), f"{func} waits"
        return out


@pytest.mark.parametrize("change", [{}, {"clip": 1.0}, {"ema": True}, {"offset_lr_mult": 10.0}])
def test_a_step_waits_for_nothing_on_its_device(monkeypatch, change):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # lacks meta
    network = ModelConfig(blocks=3, width=4, channels=1, keys=2, positions=(1, 3))
    one = Trainer(network, replace(CONFIG, **change), Processes(torch.device("meta")))
    for number in range(3):  # the first creates Adam's moments
        low = torch.empty(2, 1, 9, 7, device="meta")
        with Transfers():
            one.step(number, range(2), low, low)
    with pytest.raises(RuntimeError, match="meta"):
        one.losses[0].item()
    with Transfers(), pytest.raises(AssertionError, match="waits"):
        torch.ones(2).to("meta")


def test_averages_forget_the_start_and_then_move_slowly():
    assert trainer.ema_share(torch.tensor(0)) == pytest.approx(0.9)
    assert trainer.ema_share(torch.tensor(10**6)) == pytest.approx(0.001)


def test_averages_of_all_parameters_at_once_are_those_of_each_to_the_bit():
    def of_each(average, current, count):
        return average.lerp(current, (9 / (10 + count)).clamp(min=1 - 0.999).to(average.dtype))

    one = Trainer(PLAIN, replace(CONFIG, ema=True), ALONE)
    expected = AveragedModel(one.model, avg_fn=of_each)
    for count in (0, 1, 2, 3, 40, 41, 10**5, 10**5 + 1):
        with torch.no_grad():
            for parameter in one.model.parameters():
                parameter.add_(torch.randn_like(parameter))
        for averaged in (one.averaged, expected):
            averaged.n_averaged.fill_(count)
        one.average()
        expected.update_parameters(one.model)
    names = zip(one.averaged.state_dict().items(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(found, wanted) for (_, found), wanted in names)


def test_the_result_is_the_average_of_the_steps():
    one = Trainer(PLAIN, replace(CONFIG, ema=True), ALONE)
    expected: dict[str, torch.Tensor] = {}
    for number in range(4):
        step(one, number)
        share = 1.0 if number == 0 else max(9 / (10 + number), 0.001)  # the first is copied
        for name, weight in one.model.state_dict().items():
            before = expected.get(name, torch.zeros_like(weight))
            expected[name] = before + share * (weight - before)
    found = one.result.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name])
    assert not torch.equal(found["head.0.weight"], one.model.head[0].weight)
    plain = Trainer(PLAIN, CONFIG, ALONE)
    assert plain.result is plain.model


def test_the_rate_is_halved_again_and_again():
    one = Trainer(PLAIN, replace(CONFIG, lr_half_every=2), ALONE)
    rates = []
    for number in range(5):
        step(one, number)
        rates += [group["lr"] for group in one.optimizer.param_groups]
    assert rates == [CONFIG.lr, CONFIG.lr, CONFIG.lr / 2, CONFIG.lr / 2, CONFIG.lr / 4]
    assert rates == [one.lr(number) for number in range(5)]


def test_masks_are_drawn_with_noise_of_their_own_in_every_step():
    masked = ModelConfig(blocks=2, width=4, channels=1, keys=3, positions=(1, 2))
    losses = []
    for number in (0, 0, 1):
        one = Trainer(masked, CONFIG, ALONE)
        torch.manual_seed(0)
        for parameter in (*one.model.attention.parameters(), *one.model.tail.parameters()):
            torch.nn.init.normal_(parameter)  # at 0, nothing would be seen of the masks
        low = torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(0))
        one.step(number, range(2), low, low.roll(1, 3))
        losses += one.statistics()[0]
    assert losses[0] == losses[1] != losses[2]


def test_long_gradients_are_shortened_and_their_norms_recorded():
    def gradients(clip: float) -> tuple[torch.Tensor, list[float]]:
        one = Trainer(PLAIN, replace(CONFIG, clip=clip), ALONE)
        step(one, 0)
        losses, norms = one.statistics()
        assert len(losses) == 1
        found = [p.grad.flatten() for p in one.model.parameters() if p.grad is not None]
        return torch.cat(found), norms

    free, norms = gradients(0.0)
    assert norms == []
    norm = free.norm().item()
    long, (recorded,) = gradients(norm * 2)
    assert torch.equal(long, free)
    assert recorded == pytest.approx(norm, rel=1e-5)
    short, (recorded,) = gradients(norm / 2)
    assert recorded == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(short, free / 2)


def test_offsets_and_weights_of_keys_may_learn_at_a_rate_of_their_own():
    attended = ModelConfig(blocks=2, width=4, channels=1, keys=3, positions=(1, 2))

    def moved(offset_rate: float) -> dict[str, float]:
        one = Trainer(attended, replace(CONFIG, offset_lr_mult=offset_rate), ALONE)
        for parameter in one.model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        before = {name: p.clone() for name, p in one.model.named_parameters()}
        step(one, 0)
        return {n: (p - before[n]).abs().max().item() for n, p in one.model.named_parameters()}

    same_rate, slow = moved(1.0), moved(0.1)
    assert any(".points." in name for name in same_rate)
    for name, size in same_rate.items():
        # Adam's first step is as long as the rate
        assert slow[name] == pytest.approx(size * (0.1 if ".points." in name else 1), rel=1e-3)


@pytest.mark.parametrize("attention", [a for a, kind in ATTENTIONS.items() if kind.masked])
def test_the_masks_temperature_is_that_of_their_gradient(attention):
    size = {"blocks": 2, "width": 4, "channels": 1, "keys": 3, "positions": (1, 2)}
    masked = ModelConfig(attention=attention, **size)

    def learned(temperature: float) -> tuple[dict[str, torch.Tensor], list[float]]:
        one = Trainer(masked, replace(CONFIG, mask_temperature=temperature), ALONE)
        for parameter in one.model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        step(one, 0)
        named = one.model.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}, one.statistics()[0]

    (warm, loss), (cold, same_loss) = learned(1.0), learned(0.25)
    assert loss == same_loss  # the masks themselves are what they were
    masks = [name for name in warm if name.endswith((".mask", ".mask_bias"))]
    assert masks
    assert not any(torch.equal(warm[name], cold[name]) for name in masks)


def test_masks_without_noise_are_those_of_evaluation():
    masked = ModelConfig(blocks=2, width=4, channels=1, keys=3, positions=(1, 2))

    def loss_of(noise: bool) -> tuple[Tensor, Tensor]:
        one = Trainer(masked, replace(CONFIG, mask_noise=noise), ALONE)
        for parameter in one.model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        low = torch.rand(2, 1, 9, 7)
        with torch.no_grad():
            expected = trainer.restoration_loss("l1", one.model(low), low)
        one.step(0, range(2), low, low)
        return one.losses[0], expected

    torch.testing.assert_close(*loss_of(noise=False))
    drawn, expected = loss_of(noise=True)
    assert drawn != expected


def test_a_rate_of_its_own_is_resumed(tmp_path):
    attended = ModelConfig(blocks=1, width=4, channels=1, keys=3, positions=(1,))
    config = replace(CONFIG, offset_lr_mult=0.3)
    straight, first, second = (Trainer(attended, config, ALONE) for _ in range(3))
    for number in range(4):
        step(straight, number)
    for number in range(2):
        step(first, number)
    second.load_state(*first.state(), tmp_path / "state.safetensors")
    for number in range(2, 4):
        step(second, number)
    assert same(straight, second)


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(UsageError, match="--amp-dtype fp16 is for GPUs"):
        Trainer(PLAIN, replace(CONFIG, amp=True, amp_dtype="fp16"), ALONE)


def test_a_scaler_leaves_out_steps_and_is_resumed(monkeypatch):
    # As on a GPU, whose arithmetic the CPU can do too, slowly
    monkeypatch.setattr(trainer, "require_amp", lambda config, device: None)
    config = replace(CONFIG, amp=True, amp_dtype="fp16", ema=True, clip=1e4)
    straight = Trainer(PLAIN, config, ALONE)
    before = straight.model.head[0].weight.detach().clone()
    straight.scaler.load_state_dict({**straight.scaler.state_dict(), "scale": 2.0**126})
    step(straight, 0)
    assert straight.statistics()[1] == []  # its norm was not finite
    straight.clear_statistics()
    assert straight.statistics() == ([], [])
    assert torch.equal(straight.model.head[0].weight, before)
    assert straight.state()[1]["scaler"]["scale"] == 2.0**125
    straight.scaler.load_state_dict({**straight.scaler.state_dict(), "scale": 2.0**8})
    step(straight, 1)
    tensors, values = straight.state()
    resumed = Trainer(PLAIN, config, ALONE)
    resumed.load_state({name: t.clone() for name, t in tensors.items()}, values, Path("state"))
    for one in (straight, resumed):
        step(one, 2)
        step(one, 3)
    assert same(straight, resumed)
    assert not torch.equal(straight.model.head[0].weight, before)


def test_a_scaler_of_another_kind_is_refused(monkeypatch):
    monkeypatch.setattr(trainer, "require_amp", lambda config, device: None)
    one = Trainer(PLAIN, replace(CONFIG, amp=True, amp_dtype="fp16"), ALONE)
    tensors, values = one.state()
    with pytest.raises(CheckpointError, match=r"^state: .* gradient scaler of another run; start"):
        one.load_state(tensors, values | {"scaler": {}}, Path("state"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_fp16_learns_on_a_gpu():
    one = Trainer(
        PLAIN, replace(CONFIG, amp=True, amp_dtype="fp16"), Processes(torch.device("cuda"))
    )
    for number in range(30):
        step(one, number)
    losses, _ = one.statistics()
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("change", [{}, {"clip": 1.0, "ema": True}, {"offset_lr_mult": 10.0}])
def test_a_step_as_a_cuda_graph_learns_the_same(change):
    model = ModelConfig(blocks=2, width=8, keys=2, positions=(1, 2), channels=1)
    gpu = Processes(torch.device("cuda"))
    plain, graph = (
        Trainer(model, replace(CONFIG, cuda_graph=g, lr_half_every=4, **change), gpu)
        for g in (False, True)
    )
    for number in range(8):
        step(plain, number)
        step(graph, number)
    assert graph.graph.graph is not None
    (a, values), (b, others) = plain.state(), graph.state()
    assert a.keys() == b.keys()
    assert values["losses"] == pytest.approx(others["losses"], rel=1e-3)
    assert others["losses"][-1] != others["losses"][-2]
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-2, atol=1e-3, msg=name)


def test_where_no_graph_can_be_the_step_runs_without(capsys):
    plain, graph = (Trainer(PLAIN, replace(CONFIG, cuda_graph=g), ALONE) for g in (False, True))
    assert "--cuda-graph is left out: there are no CUDA graphs on a cpu" in capsys.readouterr().err
    for one in (plain, graph):
        step(one, 0)
    assert same(plain, graph)


class Graphs:
    """CUDA graphs on a CPU: a replay does what the step left in `work` when it was captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: str = ""):
        self.failure, self.work, self.captured = failure, None, 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Stream": lambda device: stream,
            "current_stream": lambda: stream,
            "stream": contextlib.nullcontext,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.work()),
            "graph": self.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def capture(self, graph: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        self.captured += 1
        if self.failure:
            raise RuntimeError(self.failure)
        yield


def test_a_step_is_captured_once_and_replayed_on_new_patches(monkeypatch):
    graphs, seen = Graphs(monkeypatch), []

    def double(given: Tensor) -> tuple[Tensor]:
        if graphs.captured:
            out = torch.zeros_like(given)
            graphs.work = lambda: out.copy_(given * 2)
            return (out,)
        seen.append(given)
        return (given * 2,)

    graph = step_graph.StepGraph(double, CPU)
    given = [torch.tensor([float(i)]) for i in range(6)]
    results = [graph(one) for one in given]
    assert graphs.captured == 1
    assert [id(one) for one in seen] == [id(one) for one in given[: step_graph.WARM_UP]]
    for one, (result,) in zip(given, results, strict=True):  # a later step changes no result
        assert result == one * 2


def test_a_step_that_cannot_be_captured_runs_without(monkeypatch, capsys):
    Graphs(monkeypatch, "operation not permitted\nmore")
    plain, graph = (Trainer(PLAIN, CONFIG, ALONE) for _ in range(2))
    graph.graph = step_graph.StepGraph(graph.update, CPU)
    for number in range(step_graph.WARM_UP + 2):
        for one in (plain, graph):
            step(one, number)
    assert capsys.readouterr().err.count("--cuda-graph is left out: operation not permitted") == 1
    assert graph.graph is None
    assert same(plain, graph)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_under_the_same_names():
    model = ModelConfig(blocks=1, width=4, keys=2, positions=(1,), channels=1)
    plain, compiled = (Trainer(model, replace(CONFIG, compile=c), ALONE) for c in (False, True))
    for one in (plain, compiled):
        step(one, 0)
        step(one, 1)
    (a, _), (b, _) = plain.state(), compiled.state()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_network_that_cannot_be_compiled_fails_with_the_flag(monkeypatch):
    def compile(model, **_):
        def fail(*_):
            raise RuntimeError("no compiler\nwas found")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    one = Trainer(PLAIN, replace(CONFIG, compile=True), ALONE)
    with pytest.raises(AclaError, match=r"^--compile: .* \(no compiler\); leave --compile out"):
        step(one, 0)
    monkeypatch.undo()
    plain = Trainer(PLAIN, CONFIG, ALONE)
    monkeypatch.setattr(trainer, "restoration_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its name
        step(plain, 0)
