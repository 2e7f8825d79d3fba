"""Where the Triton kernels run and where they are refused, with GPUs that are not there."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from acla.kernels import dispatch, triton_backend  # noqa: E402

ON_GPU = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)


def test_refusals_give_their_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    points = torch.zeros(1, 1, 1, 1, 3, 1)
    assert triton_backend.why_not_triton(points) == "tensors are on cpu, triton needs cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.why_not_triton(points) is None
    assert "float64" in triton_backend.why_not_triton(points.double())
    assert "float64" in triton_backend.why_not_triton(points, [points.double()])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_backend.why_not_triton(points) == "Triton is not installed"


@pytest.fixture
def pretend(monkeypatch):
    """Sets the capability of a GPU that is not there, and what Triton raises when it is asked for
    the GPU's driver; notes each time that it is asked."""

    def use(capability: tuple[int, int] = (9, 0), error: Exception | None = None) -> None:
        class Driver:
            @property
            def active(self) -> SimpleNamespace:
                use.asked += 1
                if error:
                    raise error
                return SimpleNamespace(utils=None)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(triton.runtime, "driver", Driver())
        use.asked = 0
        triton_backend.why_not_on.cache_clear()
        dispatch.log_choice.cache_clear()

    yield use
    triton_backend.why_not_on.cache_clear()
    dispatch.log_choice.cache_clear()


def test_a_gpu_that_triton_reaches_is_asked_once(pretend):
    pretend()
    assert [dispatch.choose_backend("auto", ON_GPU) for _ in range(3)] == ["triton"] * 3
    assert pretend.asked == 1


def test_gpus_too_old_for_triton_are_refused(pretend, monkeypatch):
    pretend((6, 1))
    reason = "cuda:0 has compute capability 6.1, triton needs 7.0"
    assert triton_backend.why_not_triton(ON_GPU) == reason
    assert pretend.asked == 0
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD counts otherwise
    triton_backend.why_not_on.cache_clear()
    assert triton_backend.why_not_triton(ON_GPU) is None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Failed to find C compiler.\nMore"), "Failed to find C compiler."),
        (subprocess.CalledProcessError(1, ["gcc"]), "Command '['gcc']' returned non-zero"),
        (FileNotFoundError(2, "No such file", "/sbin/ldconfig"), "/sbin/ldconfig"),
        (ImportError("failed to map segment"), "failed to map segment"),
        (AssertionError(), "AssertionError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_without_what_triton_builds_with_auto_warns_and_takes_torch(pretend, caplog, error, told):
    pretend(error=error)
    assert [dispatch.choose_backend("auto", ON_GPU) for _ in range(2)] == ["torch"] * 2
    (record,) = caplog.records
    reason = "triton needs a C compiler and Python.h to reach cuda:0: "
    assert f"took 'torch': triton, which is faster, was refused: {reason}" in record.getMessage()
    assert told in record.getMessage()
    with pytest.raises(RuntimeError, match=f"backend='triton' refused: {reason}"):
        dispatch.choose_backend("triton", ON_GPU)
    assert pretend.asked == 1


def test_tensors_on_a_cpu_ask_no_driver(pretend, monkeypatch):
    pretend(error=RuntimeError("0 active drivers"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.why_not_triton(torch.zeros(1, 1, 1, 1, 3, 1)) is None
    assert pretend.asked == 0
