"""Our networks beside others: what is timed, counted and scored."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from restoring import CAR, tiny, write_network

from acla.analysis import alternatives
from acla.models.serialization import Checkpoint
from acla.restore import pretrained

ROOT = Path(__file__).parents[1]
ATTENTION = {"attention": "acla", "keys": 2, "positions": (1,)}


def test_dncnn_has_its_authors_size():
    net = alternatives.DnCNN()
    assert sum(p.numel() for p in net.parameters()) == 2 * 9 * 64 + 18 * 9 * 64**2 + 19 * 64 + 1
    picture = torch.rand(1, 1, 7, 9)
    torch.nn.init.zeros_(net[-1].weight)
    torch.nn.init.constant_(net[-1].bias, 0.25)
    torch.testing.assert_close(net(picture), picture - 0.25)
    assert alternatives.kilo_macs(None) == (2 * 9 * 64 + 18 * 9 * 64**2) / 1e3


def test_attention_is_taken_out_of_a_copy():
    net = tiny(CAR, **ATTENTION)
    torch.nn.init.normal_(net.tail[-1].weight)
    torch.nn.init.normal_(net.attention["1"].output.weight)
    whole = Checkpoint(net, net.config, CAR, {})
    plain, picture = alternatives.without_attention(whole), torch.rand(1, 1, 12, 9)
    open_gate, shut = (
        net.forward_with_counts(picture, gates=torch.tensor([s]))[0] for s in (1.0, 0.0)
    )
    torch.testing.assert_close(plain.model(picture), shut)
    assert (open_gate - shut).abs().max() > 1e-3
    assert whole.model.attention.keys() == {"1"}
    assert alternatives.kilo_macs(plain) < alternatives.kilo_macs(whole)


def test_a_row_for_each_network_format_and_number_of_cores(
    tmp_path, capsys, monkeypatch, make_scene
):
    (tmp_path / "LIVE1").mkdir()
    for seed in range(2):
        Image.fromarray(make_scene(40, 51, seed=seed)).save(tmp_path / f"LIVE1/{seed}.png")
    monkeypatch.setattr(pretrained, "FOLDERS", (tmp_path,))
    write_network(tmp_path / "car-q10-tiny.safetensors", CAR, **ATTENTION)
    threads = torch.get_num_threads()
    flags = ["--data", str(tmp_path), "--crop", "24", "--side", "32", "--seconds", "0"]
    alternatives.main([*flags, "--json", str(tmp_path / "rows.jsonl")])
    assert torch.get_num_threads() == threads
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    names = ["car-q10-tiny", "car-q10-tiny, no attention", "DnCNN 20×64"]
    assert [(r["threads"], r["precision"], r["network"]) for r in rows] == [
        (n, p, name) for n in (1, 2) for p in ("fp32", "bf16") for name in names
    ]
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == names * 2
    for row in rows:
        assert 0 < row["s_per_mp_p20"] <= row["s_per_mp_p50"] <= row["s_per_mp_p80"]
        assert (row["psnr"] is None) == (row["network"] == names[2])
    psnr = [row["psnr"] for row in rows if row["psnr"]]
    assert np.ptp(psnr) < 0.05  # the fresh network changes nothing
    assert rows[0]["kmacs_per_pixel"] > rows[1]["kmacs_per_pixel"] > 0


def test_the_table_of_the_document_is_the_measured_one():
    rows = (ROOT / "results/restoring-cpu.jsonl").read_text(encoding="utf-8").splitlines()
    text = alternatives.times_table([json.loads(row) for row in rows])
    assert text in (ROOT / "docs/restoring.md").read_text(encoding="utf-8")
