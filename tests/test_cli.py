"""What every script does the same way: who speaks, which errors are one line, what is refused."""

import io
import subprocess
import sys

import pytest
import torch

from acla import cli, console
from acla.errors import AclaError, DataError, UsageError


def fails(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("wrong call"), 2, "error: wrong call\n"),
        (AclaError("no luck"), 1, "error: no luck\n"),
        (
            MemoryError(),
            1,
            "error: out of memory; a smaller --batch-size, --patch-size, --tile or --crop needs",
        ),
        (torch.OutOfMemoryError("CUDA"), 1, "error: out of memory; a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory;"),
        (OSError(28, "No space left on device", "a.json"), 1, "error: a.json: No space left on"),
        (KeyboardInterrupt(), 130, "stopped; --resume goes on"),
    ],
)
def test_errors_that_can_be_mended_are_one_line(capsys, error, status, line):
    with pytest.raises(SystemExit) as stopped:
        cli.run(fails(error))
    err = capsys.readouterr().err
    assert stopped.value.code == status
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        cli.run(fails(RuntimeError("shapes differ")))


def test_every_process_tells_its_own_error_and_the_first_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console.notice("preset tiny")
    console.say("29.33 dB")
    with pytest.raises(SystemExit):
        cli.run(fails(UsageError("every process says this")))
    with pytest.raises(SystemExit):
        cli.run(fails(DataError("b.png: not a readable picture")))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error in process 1: b.png: not a readable picture\n")


def test_a_terminal_without_greek_does_not_end_the_work(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="latin-1"))
    cli.run(lambda argv: console.say('{"σ": 30}'))
    sys.stdout.flush()
    assert terminal.getvalue() == b'{"\\u03c3": 30}\n'


def test_output_that_nobody_reads_ends_the_work_quietly():
    """As behind `| head -1`, and with `>&- 2>&-`."""
    code = (
        "from acla import cli, console\n"
        "def main(argv):\n"
        "    for i in range(20000): console.say(i), console.notice(i)\n"
        "cli.run(main)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    read = subprocess.Popen([sys.executable, "-c", code], **pipes)
    closed = subprocess.Popen(f"{sys.executable} -c '{code}' >&- 2>&-", **pipes, shell=True)
    assert read.stdout.readline() == b"0\n"
    read.stdout.close()
    numbers = read.stderr.read().split()
    assert numbers == [b"%d" % i for i in range(len(numbers))]
    assert read.wait() == 141
    assert closed.communicate() == (b"", b"")
    assert closed.returncode == 0


def test_a_backend_that_cannot_run_here_is_refused_at_once(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ACLA_BACKEND", "triton")
    with pytest.raises(UsageError, match="ACLA_BACKEND=triton cannot run here: "):
        cli.pick_device("cpu")
    monkeypatch.setenv("ACLA_BACKEND", "torch")
    assert cli.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("ACLA_BACKEND", "fast")
    with pytest.raises(UsageError, match="names no backend: 'fast'; known: "):
        cli.pick_device("cpu")
