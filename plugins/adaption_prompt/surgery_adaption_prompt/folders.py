"""Adapters of a model in folders, with the record of their base: what `AdaptionPromptModel` saves and loads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from torch import Tensor, nn

from surgery_adaption_prompt.architectures import is_unprojected_in_peft
from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.base_check import base_fingerprint, fingerprint_file
from surgery_adaption_prompt.checkpoints import (
    adapter_files,
    check_finite,
    load_config,
    load_state,
    peft_form,
    peft_problems,
    whole_state,
)
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.parts import parameter_shapes
from surgery_core import (
    BASE,
    OptionsError,
    StateError,
    VariantError,
    listed,
    one_writer,
    write_files,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavableAdapter:
    """An adapter that has passed every check and only needs a folder.

    Args:
        config: As it is written.
        state: Its tensors by `fqn.name`.
        modules: Its attention modules by FQN.
        is_for_peft: PEFT computes the same with it.
        held: Parameters of its modules, as this process holds them.
    """

    config: AdaptionPromptConfig
    state: Mapping[str, Tensor]
    modules: Mapping[str, AdaptedAttention]
    is_for_peft: bool
    held: tuple[Tensor, ...]

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

        Every process must call this where the modules are sharded.

        Raises:
            StateError: It has values that are not finite, or PEFT cannot have it.
        """
        state = whole_state(modules)
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
        held = tuple(found for module in modules.values() for found in module.parameters())
        return cls(
            config=config, state=state, modules=attentions, is_for_peft=not problems, held=held
        )

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write configuration, tensors and the record of the base; the first process does for all.

        Raises:
            OSError: A file could not be written; it is named, and the folder is as it was.
        """
        answers = base_fingerprint(self.modules)
        with one_writer(self.held) as is_writer:
            if is_writer:
                files = adapter_files(self.config, self.state, is_for_peft=self.is_for_peft)
                # As PEFT does: who trains saves often, and waits for no disk.
                write_files(folder, {**files, **fingerprint_file(answers)}, durable=False)


def read_folder(
    model: nn.Module, folder: str | os.PathLike[str], *, is_trainable: bool
) -> tuple[AdaptionPromptConfig, dict[str, Tensor]]:
    """Read an adapter for a model, with what PEFT's folders mean for this model.

    Raises:
        SurgeryError: The folder cannot be read.
        StateError: Its tensors are fewer values than its configuration asks for.
    """
    config = load_config(folder, peft_projects=not is_unprojected_in_peft(model))
    state = load_state(folder)
    _check_sizes(folder, config, state)
    return replace(config, inference_mode=not is_trainable), state


def _check_sizes(
    folder: str | os.PathLike[str], config: AdaptionPromptConfig, state: Mapping[str, Tensor]
) -> None:
    """Refuse a configuration that would make room for more than the tensors it comes with.

    Raises:
        StateError: Its prompts, or what projects features, are larger than all of the tensors.
    """
    shapes = parameter_shapes(config, hidden=1, heads=1)
    brought = {
        name: max((t.numel() for key, t in state.items() if key.endswith(f".{name}")), default=0)
        for name in shapes
    }
    bad = [
        f"{name}: expected at least {prod(shape):,} values in a layer, got at most {brought[name]:,}"
        for name, shape in shapes.items()
        if brought[name] < prod(shape)
    ]
    if bad:
        msg = (
            f"Adapter in {str(folder)!r} is not what its configuration says: mismatched "
            f"{'; '.join(bad)}. Restore both files, or save it again."
        )
        raise StateError(msg, mismatched=bad)


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
    is_plain = name == Path(name).name and name.isprintable()
    if not name or not is_plain or name.startswith("."):
        msg = (
            f"Adapter name {name!r} cannot name a folder: expected one without separators that does "
            "not begin with a dot. Choose another."
        )
        raise VariantError(msg)
