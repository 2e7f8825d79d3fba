"""Signals that ask a run to stop."""

import os
import signal
import threading
from pathlib import Path

import pytest

from acla import cli
from acla.training.run_dir import Stop, Stopped


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def number(request):
    """A signal, answered by raising InterruptedError but for what a test does."""

    def answer(number, frame):
        raise InterruptedError

    before = signal.signal(request.param, answer)
    yield request.param
    signal.signal(request.param, before)


def test_the_first_signal_is_noted_and_the_next_acts_as_ever(number, capfd):
    with Stop() as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == number
        assert "stopping after this step; once more stops at once" in capfd.readouterr().err
        with pytest.raises(InterruptedError):
            os.kill(os.getpid(), number)


def test_afterwards_signals_act_as_before(number):
    with Stop() as stop:
        pass
    with pytest.raises(InterruptedError):
        os.kill(os.getpid(), number)
    assert stop.asked is None


def test_a_signal_that_was_ignored_stays_so(number):
    signal.signal(number, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), number)
    assert stop.asked is None
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize("where", ["several processes", "another thread"])
def test_elsewhere_none_is_noted(number, where):
    handlers = []

    def work():
        with Stop(noted=where != "several processes"):
            handlers.append(signal.getsignal(number))

    before = signal.getsignal(number)
    if where == "another thread":
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    assert handlers == [before]


def test_what_is_said_names_the_step_and_the_way_on(number, capsys):
    def main(argv):
        with Stop() as stop:
            os.kill(os.getpid(), number)
            raise stop.at(7, Path("runs/x/state.safetensors"))

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    assert left.value.code == 128 + number
    told = f"{number.name}: stopped after step 7; --resume goes on from there (runs/x/state"
    assert capsys.readouterr().err.startswith(told)
    assert issubclass(Stopped, KeyboardInterrupt)  # so that nothing on the way takes it for a fault
