"""Flags of runs that cost next to nothing, and what they leave behind."""

import json
from pathlib import Path

SMALL = ["--preset", "tiny", "--blocks", "3", "--width", "8", "--keys", "3", "--positions", "1,3"]
SHORT = ["--batch-size", "2", "--patch-size", "16", "--steps", "6", "--val-every", "2"]


def rows(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "train.jsonl").read_text().splitlines()]
