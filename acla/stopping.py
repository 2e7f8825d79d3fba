"""Ctrl-C and SIGTERM wait for the end of a step, so that a run that is stopped loses nothing."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Self

ASKED = b"\nstopping after this step; once more stops at once\n"


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop has written its state. `status` is its exit status, as a shell
    tells the signal."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.status = 128 + number


class Stop:
    """A context in which the first SIGINT (Ctrl-C) or SIGTERM is only noted, as `asked`, for the
    work to stop where it loses nothing; the next one acts as ever. Signals that were ignored stay
    so. Where `noted` is false, and outside the main thread, none is noted."""

    def __init__(self, noted: bool = True):
        self.noted = noted and threading.current_thread() is threading.main_thread()
        self.asked: signal.Signals | None = None
        self.before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM) if self.noted else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error: object) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        self.__exit__()
        os.write(2, ASKED)  # a print may be what was interrupted

    def at(self, step: int, state: Path) -> Stopped:
        """What to raise once the state of this step is written."""
        text = (
            f"{self.asked.name}: stopped after step {step}; --resume goes on from there ({state})"
        )
        return Stopped(self.asked, text)
