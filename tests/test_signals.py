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


def test_the_first_signal_is_recorded_and_the_next_acts_as_before(number, capfd):
    with Stop() as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == number
        assert "stopping after this step" in capfd.readouterr().err
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
def test_elsewhere_none_is_recorded(number, where):
    handlers = []

    def work():
        with Stop(active=where != "several processes"):
            handlers.append(signal.getsignal(number))

    before = signal.getsignal(number)
    if where == "another thread":
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    assert handlers == [before]


def test_the_message_names_the_step_and_how_to_resume(number, capsys):
    def main(argv):
        with Stop() as stop:
            os.kill(os.getpid(), number)
            raise stop.at(7, Path("runs/x/state.safetensors"))

    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    assert exit.value.code == 128 + number
    message = capsys.readouterr().err
    assert message.startswith(f"{number.name}: stopped after step 7; --resume")
    assert "runs/x/state.safetensors" in message
    assert issubclass(Stopped, KeyboardInterrupt)  # so that nothing on the way takes it for a fault
