"""Which backend runs, and what stands behind the compiled one: the compiler and its cache."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_cases import make

from acla.kernels import BACKENDS, attend, build, cache, cpp_backend, dispatch, torch_backend

ROOT = Path(__file__).parents[1]
POINTS = torch.zeros(1, 1, 1, 1, 3, 1)


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """As in a process that has not chosen yet."""
    monkeypatch.delenv("ACLA_BACKEND", raising=False)
    caplog.set_level(logging.INFO, dispatch.__name__)
    dispatch.log_choice.cache_clear()
    yield
    dispatch.log_choice.cache_clear()


def test_auto_takes_the_compiled_kernel_and_says_so_once(fresh_choice, caplog):
    reason = cpp_backend.why_not_cpp(POINTS)
    if reason:
        pytest.skip(reason)
    assert [dispatch.choose_backend("auto", POINTS) for _ in range(3)] == ["cpp"] * 3
    (record,) = (r for r in caplog.records if r.name == dispatch.__name__)
    assert record.levelname == "INFO"
    assert "'cpp'" in record.message


def test_the_environment_presets_auto_and_nothing_else(fresh_choice, monkeypatch):
    taken = []
    forward = torch_backend.forward
    monkeypatch.setattr(torch_backend, "forward", lambda *a: taken.append("torch") or forward(*a))
    arguments = [torch.zeros(1, 3, 3, 1)], POINTS
    monkeypatch.setenv("ACLA_BACKEND", "torch")
    attend(*arguments)
    attend(*arguments, backend="reference")
    assert taken == ["torch"]
    monkeypatch.setenv("ACLA_BACKEND", "fastest")
    with pytest.raises(ValueError, match="unknown backend 'fastest'; known: auto, reference"):
        attend(*arguments)


def test_a_named_backend_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="'cpp' refused: tensors are on meta, cpp needs cpu"):
        dispatch.choose_backend("cpp", POINTS.to("meta"))
    assert {"reference", "torch", "cpp"} <= set(BACKENDS)


# ---- the compiler and its cache

# Hands out a library made before, notes each call, and can be slow, picky or broken.
COMPILER = """
import os, pathlib, shutil, sys, time
made, notes, mode = sys.argv[1:4]
flags = sys.argv[4:]
if mode == "picky" and ("-march=native" in flags or "-fopenmp" in flags):
    sys.exit("unknown flag")
if "-dM" in flags:
    print("#define FAKE 1")
    sys.exit()
with open(notes, "a") as file:
    file.write("compiled\\n")
target = pathlib.Path(flags[flags.index("-o") + 1])
if mode == "dies":
    target.write_bytes(b"half a library")
    sys.exit("killed")
time.sleep(1.0 if mode == "slow" else 0.0)
shutil.copy(made, target)
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch, fresh_choice):
    """Sets CXX to the compiler above and ACLA_CACHE to an empty folder; counts its runs."""
    made = cpp_backend.library()
    if isinstance(made, str):
        pytest.skip(made)
    script, notes = tmp_path / "compiler.py", tmp_path / "notes"
    script.write_text(COMPILER)
    notes.touch()

    def use(mode: str = "good", cache: Path = tmp_path / "cache") -> None:
        command = [sys.executable, str(script), made._name, str(notes), mode]
        monkeypatch.setenv("CXX", " ".join(f"'{word}'" for word in command))
        monkeypatch.setenv("ACLA_CACHE", str(cache))
        cpp_backend.library.cache_clear()

    use.runs = lambda: len(notes.read_text().splitlines())
    use.cache = tmp_path / "cache"
    yield use
    monkeypatch.undo()
    cpp_backend.library.cache_clear()
    cpp_backend.library()


def runs_in_cpp() -> bool:
    return make((1, 2, 2, 1, 1, 1)).attend("cpp").aggregate.isfinite().all().item()


def test_compiled_once_and_then_taken_from_the_cache(compiler, caplog, capsys):
    compiler()
    assert build.main([]) == 0
    (path,) = compiler.cache.iterdir()
    assert capsys.readouterr().out == f"{path}\n"
    for _ in range(2):
        compiler()
        assert runs_in_cpp()
    assert compiler.runs() == 1
    assert [*compiler.cache.iterdir()] == [path]
    assert caplog.text.count("compiling the C++ kernel, once") == 1


def test_building_fails_with_the_reason(compiler, monkeypatch, capsys):
    compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main([]) == 1
    assert "error: no-such-compiler failed" in capsys.readouterr().err


def test_a_half_written_library_is_made_again(compiler):
    compiler()
    assert runs_in_cpp()
    (path,) = compiler.cache.iterdir()
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    compiler()
    assert runs_in_cpp()
    assert compiler.runs() == 2
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(compiler, tmp_path):
    (tmp_path / "file").touch()
    compiler(cache=tmp_path / "file" / "cache")
    assert runs_in_cpp()
    assert compiler.runs() == 1


def test_the_users_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("ACLA_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/h")
    assert cache.cache_directory() == Path("/a")
    monkeypatch.delenv("ACLA_CACHE")
    assert cache.cache_directory() == Path("/x/acla")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.cache_directory() == Path("/h/.cache/acla")


def test_a_user_without_a_home_keeps_nothing(compiler, monkeypatch):
    compiler()
    for name in ("ACLA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert not cache.is_writable(cache.cache_directory())
    assert runs_in_cpp()
    assert compiler.runs() == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_read_only_cache_is_still_read(compiler):
    compiler()
    assert runs_in_cpp()
    compiler.cache.chmod(0o500)
    compiler()
    assert runs_in_cpp()
    assert compiler.runs() == 1


def test_a_compiler_that_dies_leaves_nothing_and_is_asked_once(compiler):
    compiler("dies")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'cpp' refused: .* failed: killed"):
            runs_in_cpp()
    assert list(compiler.cache.iterdir()) == []
    assert compiler.runs() == len(cpp_backend.EXTRAS)


def test_flags_that_a_compiler_does_not_know_are_left_out(compiler):
    compiler("picky")
    assert runs_in_cpp()


def test_a_broken_compiler_is_named_and_auto_settles_for_torch(compiler, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    cpp_backend.library.cache_clear()
    with pytest.raises(RuntimeError, match="backend='cpp' refused: false failed"):
        runs_in_cpp()
    assert [dispatch.choose_backend("auto", POINTS) for _ in range(2)] == ["torch"] * 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "took 'torch': cpp, which is faster, was refused: false failed" in record.getMessage()


def test_no_compiler_at_all(compiler, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_backend.library.cache_clear()
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found \(set CXX\)"):
        runs_in_cpp()


def test_two_processes_compile_at_once(compiler):
    compiler("slow")
    program = (
        "import torch; from acla import kernels\n"
        "rows, points = [torch.ones(1, 4, 4, 2)], torch.zeros(1, 2, 2, 1, 3, 2)\n"
        "print(kernels.attend(rows, points, backend='cpp').aggregate.sum().item())"
    )
    command = [sys.executable, "-c", program]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) for _ in range(2)
    ]
    assert [float(process.communicate(timeout=120)[0]) for process in both] == [8.0, 8.0]
    assert all(path.suffix == ".so" for path in compiler.cache.iterdir())
