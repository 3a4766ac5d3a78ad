"""Whether a model with a merged adapter survives `save_pretrained` and `from_pretrained`."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from surgery_core import StateError, listed


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasRoom:
    """A flag of a configuration with which its models have the biases that merging adds.

    Args:
        config: The model's own, or that of its text part.
        flag: Name of the flag, for example `attention_bias`; it is false now.
        projections: FQNs of all linear layers that get a bias by it.
    """

    config: PretrainedConfig
    flag: str
    projections: frozenset[str]

    def take(self) -> None:
        """Set the flag, in the configuration that the model has."""
        setattr(self.config, self.flag, True)


def missing_biases(model: nn.Module, projections: Collection[str]) -> frozenset[str]:
    """Return those of some projections that have no bias."""
    return frozenset(
        fqn for fqn in projections if getattr(model.get_submodule(fqn), "bias", None) is None
    )


def bias_room(model: PreTrainedModel, projections: Collection[str]) -> BiasRoom | None:
    """Find the flag that gives projections a bias; nothing is changed.

    A flag counts if a model of the same class, built with it on the meta device, has these biases,
    and otherwise only more biases of linear layers, which may be zero.

    Args:
        model: The base.
        projections: FQNs of linear layers without a bias.
    """
    own = model.state_dict().keys()
    text = model.config.get_text_config()
    configs = [model.config] if text is model.config else [model.config, text]
    for place, config in enumerate(configs):
        flags = [name for name, value in vars(config).items() if value is False and "bias" in name]
        for flag in flags:
            tried = copy.deepcopy(model.config)
            setattr(tried if place == 0 else tried.get_text_config(), flag, True)
            with torch.device("meta"):
                keys = type(model)(tried).state_dict().keys()
            added = keys - own
            found = frozenset(key.removesuffix(".bias") for key in added if key.endswith(".bias"))
            if (
                len(found) == len(added)
                and found >= frozenset(projections)
                and all(_is_plain(model, fqn) for fqn in found)
            ):
                return BiasRoom(config=config, flag=flag, projections=found)
    return None


def refuse_to_save(model: PreTrainedModel, projections: Collection[str]) -> None:
    """Make a merged model refuse to be saved, since loading it would drop the biases.

    Args:
        model: The base, with the adapter in the biases.
        projections: FQNs of projections whose biases its class has no room for.
    """
    message = (
        f"{type(model).__name__} with a merged adapter is not saved: from_pretrained would drop the "
        f"biases of {listed(sorted(projections))}, and the adapter with them, since no setting of "
        "the configuration makes room for them. Save the adapter with save_pretrained before "
        "merging, and load it with AdaptionPromptModel.from_pretrained; or keep the model's "
        "state_dict() yourself."
    )
    # On this one object: its class stays what transformers looks up, and copies refuse too.
    for name in ("save_pretrained", "push_to_hub"):
        setattr(model, name, partial(_refuse, message))


def _refuse(message: str, *_args: object, **_kwargs: object) -> None:
    raise StateError(message)


def _is_plain(model: nn.Module, fqn: str) -> bool:
    """Tell whether a module may be replaced by one with a bias of zero."""
    module: object = dict(model.named_modules()).get(fqn)
    return type(module) is nn.Linear and module.bias is None
