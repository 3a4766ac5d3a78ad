"""Get the model, and make examples of the demo's raw data; see docs/tutorials/train-an-adapter.md."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "demo"))

import smollm2

folder = Path("payments")
folder.mkdir(exist_ok=True)
print(smollm2.prepare())
for name, count in (("train", 600), ("heldout", 24)):
    lines = (ROOT / f"demo/data/{name}.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    pairs = [
        {"prompt": f"Name, date and amount as JSON: {row['sentence']}", "answer": row["answer"]}
        for row in rows
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"{path}: {len(pairs)} examples")
