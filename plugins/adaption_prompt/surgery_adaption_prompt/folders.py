"""Adapters of a model in folders, with the record of their base: what `AdaptionPromptModel` saves and loads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from surgery_adaption_prompt.architectures import is_unprojected_in_peft
from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.base_check import write_base_fingerprint
from surgery_adaption_prompt.checkpoints import (
    adapter_state,
    check_finite,
    load_config,
    load_state,
    peft_form,
    peft_problems,
    save_adapter,
)
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_core import OptionsError, StateError, VariantError, listed

BASE = "__base__"
"""Stands for no adapter, as in PEFT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavableAdapter:
    """An adapter that has passed every check and only needs a folder.

    Args:
        config: As it is written.
        state: Its tensors by `fqn.name`.
        modules: Its attention modules by FQN.
        is_for_peft: PEFT computes the same with it.
    """

    config: AdaptionPromptConfig
    state: Mapping[str, Tensor]
    modules: Mapping[str, AdaptedAttention]
    is_for_peft: bool

    @classmethod
    def prepare(
        cls,
        name: str,
        config: AdaptionPromptConfig,
        modules: Mapping[str, nn.Module],
        *,
        for_peft: bool,
    ) -> "SavableAdapter":
        """Check an adapter, and say it in PEFT's terms if it is meant `for_peft`.

        Raises:
            StateError: It has values that are not finite, or PEFT cannot have it.
        """
        state = adapter_state(modules)
        check_finite(state)
        if for_peft:
            config, state = peft_form(config, state)
        problems = peft_problems(config, modules)
        if problems and for_peft:
            msg = (
                f"Adapter {name!r} cannot be written for PEFT: {'; '.join(problems)}. Save it "
                "without for_peft=True, and load it with this package."
            )
            raise StateError(msg, mismatched=problems)
        attentions = {fqn: m for fqn, m in modules.items() if isinstance(m, AdaptedAttention)}
        return cls(config=config, state=state, modules=attentions, is_for_peft=not problems)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write configuration, tensors and the record of the base."""
        save_adapter(folder, self.config, self.state, is_for_peft=self.is_for_peft)
        write_base_fingerprint(folder, self.modules)


def read_folder(
    model: nn.Module, folder: str | os.PathLike[str], *, is_trainable: bool
) -> tuple[AdaptionPromptConfig, dict[str, Tensor]]:
    """Read an adapter for a model, with what PEFT's folders mean for this model.

    Raises:
        SurgeryError: The folder cannot be read.
    """
    config = load_config(folder, peft_projects=not is_unprojected_in_peft(model))
    return replace(config, inference_mode=not is_trainable), load_state(folder)


def check_same_form(
    own: AdaptionPromptConfig, config: AdaptionPromptConfig, *, folder: str | os.PathLike[str]
) -> None:
    """Refuse an adapter that computes otherwise with tensors of the same shapes.

    Raises:
        OptionsError: Kind or activation of the gate, or the place of the term, differ.
    """
    differing = [
        name
        for name in ("gate", "gate_activation", "project_output")
        if getattr(config, name) != getattr(own, name)
    ]
    if differing:
        msg = (
            f"Adapter in {str(folder)!r} cannot take another's place: expected the same "
            f"{listed(differing)}, got {listed([str(getattr(config, n)) for n in differing])}. "
            "Load it under a name of its own."
        )
        raise OptionsError(msg)


def check_name(name: str) -> None:
    """Refuse names that cannot be a folder's, that would hide what is in it, or that mean no adapter."""
    if name == BASE:
        msg = f"Adapter name {name!r} stands for the base in lists of adapters. Choose another."
        raise VariantError(msg)
    if not name or name != Path(name).name or name.startswith("."):
        msg = (
            f"Adapter name {name!r} cannot name a folder: expected one without separators that does "
            "not begin with a dot. Choose another."
        )
        raise VariantError(msg)
