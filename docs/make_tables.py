"""Write the tables of `docs/reference/` from what was tried: run as `make docs-tables`."""

import sys
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.sweep import judge  # noqa: E402 (the tests' own way of judging)
from support.tiny import MODEL_TYPES  # noqa: E402 (same)

FAMILIES = ROOT / "docs" / "reference" / "families.md"

HEADER = """\
# Families

Every model type of transformers' `AutoModelForCausalLM` mapping (transformers {version}), tried with a tiny random model of {layers} layers or so.
Made by `make docs-tables`; `tests/interop/test_families.py` checks each line.

- **right**: an untrained adapter changes no bit; each adapted layer adds its term once for each pass; with gates open that differ per head, logits equal a float64 reference written from the formula to 1e-6; decoding with a cache equals the full forward to 1e-5 wherever the base's does to 1e-6; every gate gets a finite gradient that is not zero.
  In bfloat16, with parts in float32 that `from_pretrained` keeps so and the adapter in float32: an untrained adapter changes no bit; with gates open, logits change and are finite wherever the base's are; gradients as above.
- **refused**: planning raises an error with the reason given; the model is not touched.
- **not tiny**: no small model of this type could be made and run here, for the reason given; nothing is known of it.

A row is about options near the type's defaults; a checkpoint may set others.
So Gemma 4 is right, but refused where its top layers share keys and values (as in E2B) or use keys as values.

{counts}.

| model type | verdict | attention layers, or the reason |
|---|---|---|
"""


def families() -> str:
    """Try every model type and return the page."""
    rows, counts = [], Counter[str]()
    for model_type in MODEL_TYPES:
        verdict = judge(model_type)
        counts[verdict.kind] += 1
        rows.append(f"| {model_type} | {verdict.kind} | {verdict.detail.replace('|', '/')} |")
    text = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
    header = HEADER.format(version=version("transformers"), layers=4, counts=text)
    return header + "\n".join(rows) + "\n"


def main() -> None:
    """Write every table."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    FAMILIES.write_text(families(), encoding="utf-8")


if __name__ == "__main__":
    main()
