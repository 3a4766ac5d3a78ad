"""`AdaptionPromptModel`: many adapters over one base model, with the names PEFT users know."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery_adaption_prompt.architectures import BASE_ADAPTER_METHODS
from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.base_check import BaseCheck, check_base
from surgery_adaption_prompt.checkpoints import adapter_state, load_state_
from surgery_adaption_prompt.config import PEFT_TYPE, AdaptionPromptConfig
from surgery_adaption_prompt.folders import SavableAdapter, check_name, check_same_form, read_folder
from surgery_adaption_prompt.operation import adapter_rules
from surgery_adaption_prompt.text_init import Tokenizer, prompts_from_text
from surgery_core import (
    OptionsError,
    Plan,
    SwapState,
    Transaction,
    VariantError,
    listed,
)

DEFAULT_ADAPTER = "default"
"""Name of the adapter that PEFT's format keeps in the folder itself, not in a subfolder."""


class AdaptionPromptModel(nn.Module):
    """A frozen base model and its adapters, of which at most one is in it.

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

    Raises:
        OptionsError: There is no configuration of that name, or one asks for too many layers.
        NoMatchError: The model has no attention modules, or none called `target_modules`.
        ContractError: The modules cannot be adapted, or are adapted already.

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
    ) -> None:
        super().__init__()
        if adapter_name not in configs:
            msg = (
                f"Adapter {adapter_name!r} has no configuration: configs has "
                f"{listed(sorted(configs))}. Add one under that name."
            )
            raise OptionsError(msg)
        self.model = model
        self.swap_state = SwapState(model)
        self.peft_config: dict[str, AdaptionPromptConfig] = {}
        for name, config in configs.items():
            self._add(name, config, tokenizer=tokenizer)
        # Nothing has been written so far; either both of these happen or neither.
        with Transaction() as freezing:
            for parameter in model.parameters():
                freezing.set_requires_grad(parameter, value=False)
            self.swap_state.set(adapter_name)
        self._freezing = freezing

    # -- adapters ---------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        config: AdaptionPromptConfig,
        state: Mapping[str, Tensor] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Add an adapter; which adapter is active does not change.

        Args:
            adapter_name: Its name.
            config: Its configuration.
            state: Its tensors by `fqn.name`, as an importer gives them; None for an untrained one.
            tokenizer: The base's; needed where the configuration has `init_from_text`.

        Raises:
            VariantError: The name is taken, empty, or no name for a folder.
            StateError: The state does not fit the configuration and the model.
            SurgeryError: See the class; the model is unchanged.
        """
        self._add(adapter_name, config, state, tokenizer=tokenizer)
        if self.swap_state.selected is None:
            self.swap_state.set(adapter_name)

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one; while disabled, the one that `enable_*` will activate.

        Raises:
            VariantError: There is no such adapter.
        """
        self.swap_state.set(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, the first of the others becomes so.

        Raises:
            VariantError: There is no such adapter.
        """
        others = [name for name in self.peft_config if name != adapter_name]
        then = others[0] if others and adapter_name == self.swap_state.selected else None
        self.swap_state.delete(adapter_name, then=then)
        del self.peft_config[adapter_name]

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Give an adapter another name.

        Raises:
            VariantError: There is no such adapter, or the new name is taken or no name for a folder.
        """
        check_name(new_name)
        self.swap_state.rename(adapter_name, new_name)
        self.peft_config = {
            new_name if name == adapter_name else name: config
            for name, config in self.peft_config.items()
        }

    def enable_adapter_layers(self) -> None:
        """Put the selected adapter's modules back in the model; harmless when they are there."""
        self.swap_state.enable()

    def disable_adapter_layers(self) -> None:
        """Take the active adapter's modules out of the model; harmless when they are out."""
        self.swap_state.disable()

    @contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """Run the base model for a while; may be nested."""
        with self.swap_state.disabled():
            yield self

    def unload(self) -> PreTrainedModel:
        """Remove every adapter and return the base as it was, trainable flags included.

        Raises:
            DriftError: Somebody replaced a module of the active adapter; nothing was changed.
        """
        self.swap_state.disable()
        for name in list(self.peft_config):
            self.delete_adapter(name)
        self._freezing.rollback()
        return self.model

    @property
    def active_adapter(self) -> str | None:
        """Name of the selected adapter, as in PEFT also while disabled; None without adapters."""
        return self.swap_state.selected

    @property
    def active_adapters(self) -> list[str]:
        """The same as a list of at most one name."""
        return [] if self.swap_state.selected is None else [self.swap_state.selected]

    def adapter_modules(self, adapter_name: str) -> dict[str, AdaptedAttention]:
        """Return the modules of an adapter by FQN in the base, wherever they are now.

        Raises:
            VariantError: There is no such adapter.
        """
        found = self.swap_state.variant(adapter_name)
        return {fqn: m for fqn, m in found.items() if isinstance(m, AdaptedAttention)}

    def saved_modules(self, adapter_name: str) -> dict[str, nn.Module]:
        """Return the modules trained whole with an adapter (`modules_to_save`) by FQN in the base.

        Raises:
            VariantError: There is no such adapter.
        """
        found = self.swap_state.variant(adapter_name)
        return {fqn: m for fqn, m in found.items() if not isinstance(m, AdaptedAttention)}

    # -- the model --------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the base's own signature)
        """Run the base model with the active adapter; arguments and result are the base's."""
        _refuse_rows(kwargs)
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the base's own signature)
        """Generate with the active adapter; arguments and result are those of the base's method."""
        _refuse_rows(kwargs)
        return cast("Any", self.model).generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the base has)
        """Look up in the base what is not here, as PEFT does, but for its own adapter methods.

        Raises:
            AttributeError: The base has not got it either, or it is a method for other adapters.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = vars(self).get("_modules", {}).get("model")
            if model is None:
                raise
        if name in BASE_ADAPTER_METHODS:
            msg = (
                f"AdaptionPromptModel has no {name!r}: the base's method of that name manages "
                "adapters of PEFT's. Call it on get_base_model() if that is meant."
            )
            raise AttributeError(msg)
        return getattr(model, name)

    @property
    def base_model(self) -> Self:
        """This model: in PEFT it is one further inside, so `base_model.model` is the base in both."""
        return self

    @property
    def peft_type(self) -> str:
        """`"ADAPTION_PROMPT"`."""
        return PEFT_TYPE

    @property
    def active_peft_config(self) -> AdaptionPromptConfig:
        """Configuration of the selected adapter.

        Raises:
            VariantError: There is none.
        """
        name = self.active_adapter
        if name is None:
            msg = "Model has no adapter: expected one that is active. Add one first."
            raise VariantError(msg)
        return self.peft_config[name]

    def get_base_model(self) -> PreTrainedModel:
        """Return the model that was passed in, with the active adapter's modules in it."""
        return self.model

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401 (the base's own)
    ) -> None:
        """Recompute activations in the backward pass; arguments are those of the base's method.

        Unlike the base's, it lets no gradient through the embeddings, so that layers below the
        adapted ones are not differentiated; that takes `use_reentrant=False`, the default.
        """
        base = cast("Any", self.model)
        base.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        if not (activation_checkpointing_kwargs or {}).get("use_reentrant", False):
            base.disable_input_require_grads()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many values are trained, and how many there are, in the model as it is."""
        parameters = list(self.model.parameters())
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return trainable, sum(parameter.numel() for parameter in parameters)

    def trainable_summary(self) -> str:
        """Return the line PEFT's `print_trainable_parameters` prints."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        return (
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    def print_trainable_parameters(self) -> None:
        """Print `trainable_summary`."""
        print(self.trainable_summary())  # noqa: T201 (what its name promises)

    # -- disk -------------------------------------------------------------------------------------

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
        compared at load.

        Args:
            save_directory: Takes the adapter `default`; others go into subfolders of their names.
            selected_adapters: Which to write; None means all.
            for_peft: Write only what PEFT loads and computes alike: gates of all heads become one
                where they are equal, and their activation is folded in.

        Raises:
            VariantError: There is no such adapter; nothing was written.
            StateError: An adapter has values that are not finite, or, `for_peft`, is one that PEFT
                cannot have; nothing was written.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        base_name = self.config.name_or_path or None
        prepared = {}
        for name in names:
            modules = self.swap_state.variant(name)
            config = self.peft_config[name]
            if config.base_model_name_or_path is None:
                config = replace(config, base_model_name_or_path=base_name)
            prepared[name] = SavableAdapter.prepare(name, config, modules, for_peft=for_peft)
        for name, adapter in prepared.items():
            adapter.write(Path(save_directory) / ("" if name == DEFAULT_ADAPTER else name))

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *,
        is_trainable: bool = False,
        base_check: BaseCheck = "warn",
    ) -> None:
        """Add an adapter from a folder that PEFT or `save_pretrained` wrote.

        Args:
            model_id: The folder.
            adapter_name: Its name here.
            is_trainable: Keep it trainable; otherwise it is frozen.
            base_check: What to do if it was trained for another base; see `check_base`.

        Raises:
            SurgeryError: The folder cannot be read, or does not fit this model; nothing was added.
        """
        config, state = read_folder(self.model, model_id, is_trainable=is_trainable)
        self._add(adapter_name, config, state)
        try:
            check_base(model_id, self.adapter_modules(adapter_name), policy=base_check)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        if self.swap_state.selected is None:
            self.swap_state.set(adapter_name)

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
        modules = self.swap_state.variant(adapter_name)
        own = self.peft_config[adapter_name]
        config, state = read_folder(self.model, model_id, is_trainable=not own.inference_mode)
        check_same_form(own, config, folder=model_id)
        check_base(model_id, self.adapter_modules(adapter_name), policy=base_check)
        load_state_(modules, state)
        self.peft_config[adapter_name] = replace(config, dtype=own.dtype)

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
        """Put an adapter from a folder on a model.

        Args:
            model: The base model.
            model_id: The folder.
            adapter_name: Its name here.
            is_trainable: Keep it trainable; otherwise it is frozen.
            base_check: What to do if it was trained for another base; see `check_base`.

        Raises:
            SurgeryError: The folder cannot be read, or does not fit the model; it is unchanged.
        """
        config, state = read_folder(model, model_id, is_trainable=is_trainable)
        adapted = cls(model, {adapter_name: replace(config, init_from_text=None)}, adapter_name)
        try:
            load_state_(adapted.swap_state.variant(adapter_name), state)
            check_base(model_id, adapted.adapter_modules(adapter_name), policy=base_check)
        except BaseException:
            adapted.unload()
            raise
        adapted.peft_config[adapter_name] = config
        return adapted

    def _add(
        self,
        name: str,
        config: AdaptionPromptConfig,
        state: Mapping[str, Tensor] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_name(name)
        if config.init_from_text is not None and state is None and tokenizer is None:
            msg = (
                f"Adapter {name!r} starts from a text: expected the base's tokenizer, got none. "
                "Pass tokenizer=, or leave init_from_text out."
            )
            raise OptionsError(msg)
        plan = Plan.draft(
            self.model, adapter_rules(self.model, config), originals=self.swap_state.originals()
        )
        self.swap_state.add(name, plan)
        try:
            if state is not None:
                load_state_(self.swap_state.variant(name), state)
            elif config.init_from_text is not None and tokenizer is not None:
                self._start_from_text(name, config.init_from_text, tokenizer)
        except BaseException:
            self.swap_state.delete(name)
            raise
        self.peft_config[name] = config

    def _start_from_text(self, name: str, text: str, tokenizer: Tokenizer) -> None:
        modules = self.adapter_modules(name)
        with self.swap_state.disabled():
            prompts = prompts_from_text(self.model, modules, text, tokenizer)
        load_state_(modules, {**adapter_state(modules), **prompts})


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
    return AdaptionPromptModel(model, {adapter_name: peft_config}, adapter_name)


def _refuse_rows(kwargs: Mapping[str, object]) -> None:
    """Refuse a choice of adapters by row, which the base would ignore."""
    if "adapter_names" in kwargs:
        msg = (
            "adapter_names is not supported: expected one adapter for the whole batch. Use "
            "set_adapter, and run the rows of each adapter on their own."
        )
        raise OptionsError(msg)
