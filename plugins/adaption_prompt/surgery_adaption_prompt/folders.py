"""Adapters of a model in folders, with the record of their base: what `AdaptionPromptModel` saves and loads."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from torch import Tensor, nn

from surgery_adaption_prompt.architectures import is_unprojected_in_peft
from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.base_check import Fingerprint, base_fingerprint, fingerprint_text
from surgery_adaption_prompt.checkpoints import (
    AdapterFolder,
    adapter_files,
    check_finite,
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
    can_name_folder,
    listed,
    name_problem,
    one_writer,
    write_folders,
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

    def files(self, answers: Fingerprint) -> dict[str, bytes]:
        """Return what its files hold, by name.

        Args:
            answers: Of its base; see `base_fingerprint`.
        """
        base = fingerprint_text(answers)
        return adapter_files(self.config, self.state, is_for_peft=self.is_for_peft, base=base)


DEFAULT_ADAPTER = "default"
"""Name of the adapter that PEFT's format keeps in the folder itself, not in a subfolder."""


def folders_of(
    directory: str | os.PathLike[str], adapters: Mapping[str, SavableAdapter]
) -> dict[Path, SavableAdapter]:
    """Return adapters by the folders they are saved to.

    Args:
        directory: Takes the adapter `default`; others go into subfolders of their names.
        adapters: By name.

    Raises:
        StateError: A subfolder is a link, which could lead anywhere.
    """
    root = Path(directory)
    found = {
        root / ("" if name == DEFAULT_ADAPTER else name): one for name, one in adapters.items()
    }
    links = [str(folder) for folder in found if folder != root and folder.is_symlink()]
    if links:
        msg = (
            f"Nothing was saved: {listed(links)} is a link to another folder. Remove the link, or "
            "save that adapter to the folder itself."
        )
        raise StateError(msg, mismatched=links)
    return found


def write_adapters(adapters: Mapping[Path, SavableAdapter]) -> None:
    """Write adapters to folders, all of them or none unless a file cannot be put in its place.

    The first process writes for all, and every one must call this.

    Args:
        adapters: By folder.

    Raises:
        OSError: A file could not be written; see `write_folders`.
    """
    answers = {folder: base_fingerprint(found.modules) for folder, found in adapters.items()}
    with one_writer(one for found in adapters.values() for one in found.held) as is_writer:
        if is_writer:
            # As PEFT does: who trains saves often, and waits for no disk.
            each = ((folder, found.files(answers[folder])) for folder, found in adapters.items())
            write_folders(each, durable=False)


def config_for(
    model: nn.Module, found: AdapterFolder, *, is_trainable: bool
) -> AdaptionPromptConfig:
    """Return the configuration of an adapter for a model, with what PEFT's folders mean for this one.

    Raises:
        OptionsError: It is no configuration of an adaption prompt.
        StateError: Its tensors are fewer values than its configuration asks for.
    """
    config = found.config(peft_projects=not is_unprojected_in_peft(model))
    _check_sizes(found.folder, config, found.state)
    return replace(config, inference_mode=not is_trainable)


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


def check_name(name: str, others: Iterable[str] = ()) -> None:
    """Refuse names that cannot be saved to a folder of their own, or that mean no adapter.

    Args:
        name: The name.
        others: Of the adapters it will stand next to.

    Raises:
        VariantError: It is such a name, or not text.
    """
    given: object = name
    if not isinstance(given, str):
        msg = f"Adapter name is {given!r}: expected text. Pass a name such as 'default'."
        raise VariantError(msg)
    if name == BASE:
        msg = f"Adapter name {name!r} stands for the base in lists of adapters. Choose another."
        raise VariantError(msg)
    if not can_name_folder(name):
        msg = (
            f"Adapter name {name!r} cannot name a folder: expected one without separators that does "
            "not begin with a dot. Choose another."
        )
        raise VariantError(msg)
    if (problem := name_problem(name, others)) is not None:
        msg = f"Adapter name {name!r:.80} cannot be saved: {problem}. Choose another."
        raise VariantError(msg)
