"""Stacks of layers: which of them the topmost layers are counted in."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from surgery_core import OptionsError, listed


def one_stack(tree: Mapping[str, nn.Module], fqns: Collection[str], *, named: bool) -> list[str]:
    """Return the modules of one stack of layers, in the order in which they come.

    Models of several modalities have several stacks, such as an audio tower and a language model,
    whose layers are numbered each for itself. Unless the user said which, the one in the model's text
    decoder is meant.

    Args:
        tree: The model's modules by FQN.
        fqns: Attention modules to choose from.
        named: Whether the user gave a pattern of whole names.

    Raises:
        OptionsError: There are several stacks, and no way to tell which is meant.
    """
    stacks: dict[str, list[str]] = {}
    for fqn in fqns:
        stacks.setdefault(_container(fqn), []).append(fqn)
    if len(stacks) > 1 and not named:
        decoder = _decoder(tree)
        inside = {
            name: found for name, found in stacks.items() if f"{name}.".startswith(f"{decoder}.")
        }
        stacks = inside if decoder and inside else stacks
    if len(stacks) > 1:
        patterns = [_pattern(found[0]) for found in stacks.values()]
        msg = (
            "adapter_layers counts the layers of one stack: this model has several, got "
            f"{listed(sorted(patterns))}. Pass one of these patterns as target_modules."
        )
        raise OptionsError(msg)
    return [fqn for found in stacks.values() for fqn in found]


def _decoder(tree: Mapping[str, nn.Module]) -> str:
    """Return the FQN of the text decoder as far as the model says; empty for the model itself."""
    root = tree.get("")
    if not isinstance(root, PreTrainedModel):
        return ""
    names = {id(module): fqn for fqn, module in tree.items()}
    decoder = names.get(id(cast("Any", root).get_decoder()), "")
    if decoder:
        return decoder
    embeddings = ""
    # Some models have no embeddings of their own to give.
    with suppress(NotImplementedError):
        embeddings = names.get(id(root.get_input_embeddings()), "")
    return embeddings.rpartition(".")[0]


def _container(fqn: str) -> str:
    """Return what comes before the first number: `model.layers` for `model.layers.3.self_attn`."""
    segments = fqn.split(".")
    end = next(
        (place for place, segment in enumerate(segments) if segment.isdigit()), len(segments)
    )
    return ".".join(segments[:end])


def _pattern(fqn: str) -> str:
    return ".".join("*" if segment.isdigit() else segment for segment in fqn.split("."))
