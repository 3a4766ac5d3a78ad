"""What litgpt saved of LLaMA-Adapter V2, taken apart: scales and biases, norms, and the rest."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from surgery_core import StateError, SurgeryError, listed, load_pickled
from surgery_scale_shift.linear import BIAS, SCALE

_PROMPTS = (".adapter_wte.weight", ".gating_factor")
"""Ends of the names of what the operation for the prompts would read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LitgptAdapter:
    """The tensors in a file, by whose they are; names as in the file.

    Args:
        scales: Scales and biases of linear layers.
        norms: Parameters of norms.
        prompts: Prompts and gates, which are not of this plugin.
    """

    scales: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: Mapping[str, Tensor] = field(default_factory=dict)


def read_adapter(path: str | os.PathLike[str]) -> LitgptAdapter:
    """Read `lit_model.pth.adapter_v2`; nothing but tensors is read from it, and no code is run.

    Raises:
        SurgeryError: The file is damaged, or holds something else.

    Source:
        github.com/Lightning-AI/litgpt, litgpt/adapter_v2.py, 0.4.13 to 0.5.13 (Apache-2.0): under
        `model`, or not nested, what `adapter_filter` lets through: `{layer}.adapter_scale` and
        `{layer}.adapter_bias`, weights and biases of `norm_1`, `norm_2` and `ln_f`, and per attention
        `adapter_wte.weight` and `gating_factor`.
    """
    subject = f"litgpt checkpoint {os.fspath(path)!r}"
    found = load_pickled(path, subject=subject)
    scales = {name: t for name, t in found.items() if name.endswith((f".{SCALE}", f".{BIAS}"))}
    prompts = {name: t for name, t in found.items() if name.endswith(_PROMPTS)}
    norms = {name: t for name, t in found.items() if not {name} & {*scales, *prompts}}
    if not scales:
        msg = (
            f"{subject} is not of the method adapter_v2: expected names that end in '.{SCALE}', got "
            f"{listed(sorted(found))}. Read it with the operation it is for."
        )
        raise SurgeryError(msg)
    return LitgptAdapter(scales=scales, norms=norms, prompts=prompts)


def check_names(
    path: str | os.PathLike[str], names: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Refuse tensors of modules that the model does not have under the names of the file.

    litgpt's names are those of its own models, in which queries, keys and values are one projection,
    in an order of rows that changed between its versions. They are not translated.

    Raises:
        StateError: All such names are in the message.
    """
    fqns = {fqn for fqn, _ in model.named_modules(remove_duplicate=False)}
    strange = sorted(name for name in names if name.rpartition(".")[0] not in fqns)
    if strange:
        msg = (
            f"litgpt checkpoint {os.fspath(path)!r} is for a model with other names: expected "
            f"modules of {type(model).__name__}, got {listed(strange)}. Pass the model of litgpt "
            "itself; names are not translated, since projections that litgpt fuses would have to be "
            "taken apart."
        )
        raise StateError(msg, unexpected=strange)
