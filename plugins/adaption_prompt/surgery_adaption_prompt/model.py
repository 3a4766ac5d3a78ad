"""`AdaptionPromptModel`: many adapters over one base model, with the names PEFT users know."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery_adaption_prompt.arguments import (
    check_adapter_name,
    check_adapter_names,
    check_base_check,
    check_config,
    check_configs,
    check_model,
    check_path,
    check_weights,
)
from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.base_check import BaseCheck, check_base
from surgery_adaption_prompt.checkpoints import AdapterFolder, load_state_
from surgery_adaption_prompt.composition import Composition
from surgery_adaption_prompt.config import PEFT_TYPE, AdaptionPromptConfig
from surgery_adaption_prompt.folders import (
    DEFAULT_ADAPTER,
    SavableAdapter,
    check_same_form,
    config_for,
    folders_of,
    write_adapters,
)
from surgery_adaption_prompt.gate_plot import draw_gates
from surgery_adaption_prompt.materialise import materialised
from surgery_adaption_prompt.merging import MergingManager
from surgery_adaption_prompt.selection import MERGED, ROWS, prompt_modules, weights_of
from surgery_adaption_prompt.state_names import check_same_names, decoded, encoded
from surgery_adaption_prompt.status import ModelStatus, adapter_status, model_status
from surgery_adaption_prompt.store import AdapterStore
from surgery_adaption_prompt.text_init import Tokenizer
from surgery_core import (
    OptionsError,
    Transaction,
    VariantError,
    check_preflight,
    diagnose,
    listed,
    parameter_places,
    require_names,
    reshard_,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AdaptionPromptModel(MergingManager):
    """A frozen base model and its adapters, of which one, or a composition of some, is in it.

    The top L attention modules of the base are replaced by `AdaptedAttention` modules that wrap
    them. `SwapState` stores, removes and restores those of each adapter; the active adapter is never
    in its store. Disabling takes the modules out of the model, which then is the base again, object
    for object.

    Life cycle: construction freezes the base and activates `adapter_name`; `unload` ends it, and
    gives back the base as it was.

    Args:
        model: A decoder of transformers 5; changed in place.
        configs: Configurations by adapter name; all of them are added.
        adapter_name: Which of them to activate.
        tokenizer: The base's; needed where a configuration has `init_from_text`.
        store: Adapters on disk, which are loaded when they are asked for.

    Raises:
        OptionsError: There is no configuration of that name, or one asks for too many layers.
        NoMatchError: The model has no attention modules, or none called `target_modules`.
        ContractError: The modules cannot be adapted, or are adapted already.
        PreflightError: The model is wrapped in something that keeps it from being worked on.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> base = LlamaForCausalLM(
        ...     LlamaConfig(
        ...         vocab_size=8,
        ...         hidden_size=8,
        ...         intermediate_size=8,
        ...         num_hidden_layers=2,
        ...         num_attention_heads=2,
        ...     )
        ... )
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> expected = base(tokens).logits
        >>> config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2)
        >>> model = AdaptionPromptModel(base, {"default": config}, "default")
        >>> torch.equal(expected, model(tokens).logits)
        True
    """

    def __init__(
        self,
        model: PreTrainedModel,
        configs: Mapping[str, AdaptionPromptConfig],
        adapter_name: str,
        *,
        tokenizer: Tokenizer | None = None,
        store: AdapterStore | None = None,
    ) -> None:
        check_model(model)
        check_configs(configs)
        check_adapter_name(adapter_name)
        check_preflight(diagnose(model))
        super().__init__(model, store=store)
        if adapter_name not in configs:
            msg = (
                f"Adapter {adapter_name!r} has no configuration: configs has "
                f"{listed(sorted(configs))}. Add one under that name."
            )
            raise OptionsError(msg)
        for name, config in configs.items():
            self._add(name, config, tokenizer=tokenizer)
        # Nothing has been written so far; either both of these happen or neither.
        places = parameter_places(model)
        with Transaction() as freezing:
            for parameter in model.parameters():
                at = places.get(id(parameter), ())
                freezing.set_requires_grad(parameter, value=False, places=at)
            self.swap_state.set(adapter_name)
        self._freezing = freezing

    @property
    def peft_type(self) -> str:
        """`"ADAPTION_PROMPT"`."""
        return PEFT_TYPE

    def num_adapters(self) -> int:
        """Return how many adapters there are, those in the store included."""
        return len(self.peft_config) + (0 if self.store is None else len(self.store.names()))

    @property
    def active_peft_config(self) -> AdaptionPromptConfig:
        """Configuration of the selected adapter.

        Raises:
            VariantError: There is none.
        """
        names = self.active_adapters
        if not names:
            msg = "Model has no adapter: expected one that is active. Add one first."
            raise VariantError(msg)
        if len(names) > 1:
            msg = (
                f"Model has {len(names)} active adapters: expected one, got {listed(names)}. Look "
                "their configurations up in peft_config."
            )
            raise VariantError(msg)
        return self.peft_config[names[0]]

    def adapter_parameters(self, adapter_names: Sequence[str]) -> list[nn.Parameter]:
        """Return the parameters of adapters that are trained, active or not, for an optimizer.

        Raises:
            VariantError: There is no such adapter.
        """
        check_adapter_names(adapter_names, what="adapter_names")
        reshard_(self)
        return [
            parameter
            for name in adapter_names
            for module in self.adapter_modules(name).values()
            for parameter in module.prompt_parameters().values()
            if parameter.requires_grad
        ]

    def condition_sizes(self) -> dict[str, int]:
        """Return the conditioned adapters that the running code uses, with their `condition_size`."""
        used = self.sharing.used()
        if used is not None:
            names: Collection[str] = used.names
        else:
            # Rows in buffers take no conditioned adapter, whatever was active before.
            names = () if self._kind() == ROWS else weights_of(self._choice())
        sizes = ((name, self.peft_config[name].condition_size) for name in names)
        return {name: size for name, size in sizes if size is not None}

    def saved_modules(self, adapter_name: str) -> dict[str, nn.Module]:
        """Return the modules trained whole with an adapter (`modules_to_save`) by FQN in the base.

        Raises:
            VariantError: There is no such adapter.
        """
        check_adapter_name(adapter_name)
        found = self.swap_state.variant(adapter_name)
        return {fqn: m for fqn, m in found.items() if not isinstance(m, AdaptedAttention)}

    def get_extra_state(self) -> Tensor:
        """Return the names of the adapters whose tensors `state_dict` has; torch calls this.

        Their keys do not have them: a base with an adapter keeps its FQNs.
        """
        return encoded(self._named_in_state())

    def set_extra_state(self, state: object) -> None:
        """Refuse a state dict of another adapter than the active one; torch calls this first.

        Raises:
            StateError: It is of another; nothing was loaded.
        """
        check_same_names(decoded(state), self._named_in_state())

    def _named_in_state(self) -> list[str]:
        if not self.swap_state.is_enabled or self._kind() in (MERGED, ROWS):
            return []
        return self.active_adapters

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,  # noqa: FBT001 (same)
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        super()._load_from_state_dict(*rest)
        # Those of 0.1.0, and of the base alone, do not have it.
        if f"{prefix}_extra_state" in missing_keys:
            missing_keys.remove(f"{prefix}_extra_state")

    def status(self) -> ModelStatus:
        """Return what is active and what is stored, with sizes, places and gates."""
        return model_status(
            swap_state=self.swap_state, configs=self.peft_config, selected=self.active_adapters
        )

    def plot_gates(self, adapter_name: str, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draw the gates of an adapter by layer and head; needs the extra `plots` (matplotlib).

        Args:
            adapter_name: Its name.
            path: File to write, of the type its suffix names; None for none.

        Raises:
            VariantError: There is no such adapter.
            SurgeryError: matplotlib is not installed.
        """
        check_adapter_name(adapter_name)
        modules = self.swap_state.variant(adapter_name)
        return draw_gates(
            adapter_status(adapter_name, self.peft_config[adapter_name], modules), path
        )

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Add the weighted sum of adapters as an adapter, where that is exact; see `materialised`.

        Args:
            adapters: Names of those to add up.
            weights: Factor on each one's term, dimensionless.
            adapter_name: Name of the sum.

        Raises:
            OptionsError: The sum is no adapter's term, or there are not as many weights as adapters.
            VariantError: There is no such adapter, or the name is taken.
        """
        check_adapter_names(adapters, what="adapters")
        check_weights(weights)
        if len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
            msg = (
                f"Weighted adapter {adapter_name!r} has {len(adapters)} adapters and "
                f"{len(weights)} weights: expected one weight for each, no adapter twice."
            )
            raise OptionsError(msg)
        composition = Composition(dict(zip(adapters, weights, strict=True)))
        with self._loaded(composition.weights), self.sharing.lock:
            require_names(composition.weights, self.peft_config)
            parts = [
                (self.peft_config[name], prompt_modules(name, self.swap_state), weight)
                for name, weight in composition.weights.items()
            ]
            self.add_adapter(adapter_name, *materialised(parts))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: Sequence[str] | None = None,
        for_peft: bool = False,
    ) -> None:
        """Write adapters in PEFT's folder format, each with its own tensors, active or not.

        An adapter with which PEFT would compute something else (a gate for each head, for example)
        gets a `peft_type` that PEFT refuses to load. The base is recorded beside the adapter, and
        compared at load. Where the model is spread over processes every one of them must call this,
        the first one writes, and all return when it has.

        Args:
            save_directory: Takes the adapter `default`; others go into subfolders of their names.
            selected_adapters: Which to write; None means all.
            for_peft: Write only what PEFT loads and computes alike: gates of all heads become one
                where they are equal, and their activation is folded in.

        Raises:
            VariantError: There is no such adapter; nothing was written.
            StateError: An adapter has values that are not finite, or, `for_peft`, is one that PEFT
                cannot have; or its subfolder is a link. Nothing was written.
            OSError: A file could not be written. Nothing was changed, unless a note on the error
                says what was saved before it.
        """
        check_path(save_directory, what="save_directory")
        if selected_adapters is not None:
            check_adapter_names(selected_adapters, what="selected_adapters")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        base_name = self.config.name_or_path or None
        reshard_(self)
        prepared = {}
        for name in names:
            modules = self.swap_state.variant(name)
            config = self.peft_config[name]
            if config.base_model_name_or_path is None:
                config = replace(config, base_model_name_or_path=base_name)
            prepared[name] = SavableAdapter.prepare(name, config, modules, for_peft=for_peft)
        write_adapters(folders_of(save_directory, prepared))

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *,
        is_trainable: bool = False,
        base_check: BaseCheck = "warn",
    ) -> None:
        """Add an adapter from a folder that PEFT or `save_pretrained` wrote.

        It becomes the active one if there is no other.

        Args:
            model_id: The folder.
            adapter_name: Its name here.
            is_trainable: Keep it trainable; otherwise it is frozen.
            base_check: What to do if it was trained for another base; see `check_base`.

        Raises:
            SurgeryError: The folder cannot be read, or does not fit this model; nothing was added.
        """
        with self.sharing.lock:
            self.add_from_folder(
                model_id, adapter_name, is_trainable=is_trainable, base_check=base_check
            )
            self._select_first(adapter_name)

    def add_from_folder(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *,
        is_trainable: bool = False,
        base_check: BaseCheck = "warn",
    ) -> None:
        """Do what `load_adapter` does, but never make the adapter the active one.

        Args:
            model_id: The folder.
            adapter_name: Its name here.
            is_trainable: Keep it trainable; otherwise it is frozen.
            base_check: What to do if it was trained for another base; see `check_base`.

        Raises:
            SurgeryError: See `load_adapter`.
        """
        check_path(model_id, what="model_id")
        check_base_check(base_check)
        found = AdapterFolder.read(model_id)
        config = config_for(self.model, found, is_trainable=is_trainable)
        with self.sharing.lock:
            self._add(adapter_name, config, found.state)
            try:
                check_base(found, self.adapter_modules(adapter_name), policy=base_check)
            except BaseException:
                self.delete_adapter(adapter_name)
                raise

    def hotswap_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *,
        base_check: BaseCheck = "warn",
    ) -> None:
        """Put the tensors of a folder in the place of an adapter's, without new parameters.

        What was compiled or captured for the adapter (`torch.compile`, CUDA graphs) stays good.

        Args:
            model_id: The folder; its adapter has the same layers, lengths and kind of gate.
            adapter_name: The adapter whose values are replaced; it may be active.
            base_check: What to do if the new one was trained for another base; see `check_base`.

        Raises:
            VariantError: There is no such adapter.
            StateError: The tensors do not fit; nothing was changed.
            OptionsError: The two compute otherwise, for example with another gate activation.
        """
        check_adapter_name(adapter_name)
        check_path(model_id, what="model_id")
        check_base_check(base_check)
        with self.sharing.lock:
            reshard_(self)
            modules = self.swap_state.variant(adapter_name)
            own = self.peft_config[adapter_name]
            found = AdapterFolder.read(model_id)
            config = config_for(self.model, found, is_trainable=not own.inference_mode)
            check_same_form(own, config, folder=model_id)
            check_base(found, self.adapter_modules(adapter_name), policy=base_check)
            load_state_(modules, found.state)
            self.peft_config[adapter_name] = replace(config, dtype=own.dtype)
            self._refresh_rows()

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT_ADAPTER,
        *,
        is_trainable: bool = False,
        base_check: BaseCheck = "warn",
    ) -> Self:
        """Put an adapter from a folder on a model, in evaluation mode unless it is to be trained.

        Args:
            model: The base model.
            model_id: The folder.
            adapter_name: Its name here.
            is_trainable: Keep it trainable; otherwise it is frozen.
            base_check: What to do if it was trained for another base; see `check_base`.

        Raises:
            SurgeryError: The folder cannot be read, or does not fit the model; it is unchanged.
        """
        check_model(model)
        check_adapter_name(adapter_name)
        check_path(model_id, what="model_id")
        check_base_check(base_check)
        found = AdapterFolder.read(model_id)
        config = config_for(model, found, is_trainable=is_trainable)
        adapted = cls(model, {adapter_name: replace(config, init_from_text=None)}, adapter_name)
        try:
            load_state_(adapted.swap_state.variant(adapter_name), found.state)
            check_base(found, adapted.adapter_modules(adapter_name), policy=base_check)
        except BaseException:
            adapted.unload()
            raise
        adapted.peft_config[adapter_name] = config
        return adapted if is_trainable else adapted.eval()


def get_peft_model(
    model: PreTrainedModel,
    peft_config: AdaptionPromptConfig,
    adapter_name: str = DEFAULT_ADAPTER,
) -> AdaptionPromptModel:
    """Put an untrained adapter on a model, as PEFT's function of that name does.

    Args:
        model: The base model.
        peft_config: Configuration of the adapter.
        adapter_name: Its name.

    Raises:
        SurgeryError: See `AdaptionPromptModel`; the model is unchanged.
    """
    check_adapter_name(adapter_name)
    check_config(peft_config, name=adapter_name)
    return AdaptionPromptModel(model, {adapter_name: peft_config}, adapter_name)
