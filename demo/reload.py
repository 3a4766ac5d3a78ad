"""Put a saved adapter on a freshly loaded base, and print the tokens it replies with, as JSON.

Started by `run.py` in a process of its own: `python reload.py FOLDER NUMBER_OF_SENTENCES`.
"""

import json
import sys

from evaluate import generate
from smollm2 import load
from surgery_adaption_prompt import AdaptionPromptModel
from task import read_examples


def main(folder: str, number: str) -> None:
    """Reply to the first held-out sentences with the adapter in a folder."""
    base, tokenizer = load()
    model = AdaptionPromptModel.from_pretrained(base, folder, "reloaded")
    sentences = [example.sentence for example in read_examples("heldout.jsonl")[: int(number)]]
    print(json.dumps(generate(model, tokenizer, sentences).tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
