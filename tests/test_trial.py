"""Networks trained side by side."""

import json
import re
from pathlib import Path

import pytest
import torch

from acla.analysis import trial
from acla.errors import AclaError, UsageError
from acla.models.serialization import load_model
from acla.scripts import train

FLAGS = ["--preset", "tiny", "--task", "demosaic", "--blocks", "2", "--width", "4", "--steps", "2"]
FLAGS += ["--batch-size", "2", "--patch-size", "16", "--val-every", "1", "--device", "cpu"]
ACLA = ["--positions", "2", "--keys", "2"]
NETWORKS = ["--network", "none: --attention none", "--network", f"acla: {' '.join(ACLA)}"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder / "model.safetensors").model.state_dict()


def test_networks_side_by_side_are_those_of_train_alone(tmp_path, capsys):
    out = ["--out", str(tmp_path / "trial"), "--json", str(tmp_path / "rows.jsonl")]
    trial.main([*NETWORKS, "--seeds", "0,1", *out, *FLAGS])
    printed = capsys.readouterr().out
    train.main([*FLAGS, *ACLA, "--seed", "1", "--out", str(tmp_path / "alone")])
    together, alone = weights(tmp_path / "trial" / "acla-1"), weights(tmp_path / "alone")
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["network"], r["seed"], r["step"]) for r in rows] == [
        (name, seed, 2) for seed in (0, 1) for name in ("none", "acla")
    ]
    plain, acla = rows[0]["val_psnr"], rows[1]["val_psnr"]
    other = rows[3]["val_psnr"] - rows[2]["val_psnr"]
    (line,) = re.findall(r"^\| acla .*$", printed, re.MULTILINE)
    assert f"{(acla - plain + other) / 2:+.3f} ±" in line
    assert f"| {rows[1]['params']:,} " in line
    capsys.readouterr()
    trial.main(["--show", str(tmp_path / "rows.jsonl")])
    assert capsys.readouterr().out in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--network", "a: --attention none"] * 2, "--network: every NAME once"),
        (["--network", "a: --attention none", "--seeds", "1,1"], "--seeds: every seed once"),
        (["--network", "a: --attention none --ring 3"], "--offset-radius"),
        ([], "--network"),
        (["--network", "a: --attention none", "--show", "rows.jsonl"], "--show"),
        (["--show", "rows.jsonl"], "--show trains nothing"),
    ],
)
def test_refused_calls(tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        trial.main([*flags, "--out", str(tmp_path), *FLAGS])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"network": 1}', "{"])
def test_other_files_have_no_table(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(AclaError, match="not a file of --json"):
        trial.main(["--show", str(tmp_path / "rows.jsonl")])
