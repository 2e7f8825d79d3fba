"""Calls of train.py that are refused, before anything is written."""

from pathlib import Path

import pytest
import torch
from running import SHORT, SMALL

import train
from acla.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--resume"], UsageError, "holds no state"),
        (["--positions", "3,99"], UsageError, "do not fit"),
        (["--task", "sr", "--q", "10"], UsageError, "--q belongs"),
        (["--device", "cuda"], UsageError, "no CUDA device"),
        (["--seed", "9" * 30], UsageError, "--seed must be 0 or more and below"),
        (["--train-set", "DIV2K"], DataError, "--data DIR"),
        (["--train-set", "DIV2K", "--data", "nowhere"], DataError, "nowhere is no folder"),
        (["--arch", "nowhere.json"], Exception, "no such file"),
        (["--workers", "-1"], UsageError, "--workers must be 0 or more"),
        (["--amp", "--amp-dtype", "fp16", "--device", "cpu"], UsageError, "fp16 is for GPUs"),
        (["--amp-dtype", "fp16"], UsageError, "goes with --amp"),
    ],
)
def test_wrong_calls_say_what_to_do_and_leave_nothing(words, error, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(error, match=message):
        train.main([*words, "--preset", "tiny"])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "flag", "where"),
    [
        ("--arch none", "--keys", "--attention none"),
        ("--arch none", "--offset-radius", "--attention none"),
        ("--attention cla", "--mask-bias", "--attention cla"),
        ("--attention se", "--offset-lr-mult", "--attention se"),
        ("--attention cla", "--mask-temperature", "--attention cla"),
        ("--arch paper", "--group-blocks", "--backbone edsr"),
        ("--backbone a2n --arch none", "--residual-scale", "--backbone a2n"),
        ("--arch paper", "--reduction", "--backbone edsr"),
    ],
)
def test_flags_that_change_nothing_are_refused(words, flag, where):
    with pytest.raises(UsageError, match=f"^{flag} changes nothing with {where}: leave it out$"):
        train.main([*words.split(), flag, "3", "--preset", "tiny"])
    assert not Path("runs").exists()


def test_unknown_backends_are_refused(monkeypatch):
    monkeypatch.setenv("ACLA_BACKEND", "nope")
    with pytest.raises(UsageError, match="ACLA_BACKEND names no backend: 'nope'"):
        train.main([*SMALL, *SHORT])
    assert not Path("runs").exists()
