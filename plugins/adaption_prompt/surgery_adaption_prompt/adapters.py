"""Adapters over one base model, in memory: which there are, which are active, and for whom."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self, cast

from torch import Tensor
from transformers import PreTrainedModel

from surgery_adaption_prompt.architectures import Contexts
from surgery_adaption_prompt.arguments import check_adapter_name, check_config, check_state
from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.checkpoints import adapter_state, load_state_
from surgery_adaption_prompt.composition import Composition, composed_adapters
from surgery_adaption_prompt.condition import with_features_of_now
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.facade import BaseFacade
from surgery_adaption_prompt.fixed_rows import FixedRows, Rows, fixed_rows_rule
from surgery_adaption_prompt.folders import check_name
from surgery_adaption_prompt.operation import adapter_rules
from surgery_adaption_prompt.rows import entries_of
from surgery_adaption_prompt.selection import (
    COMPOSED,
    MERGED,
    ROWS,
    Choice,
    Derived,
    choices_of,
    prompt_modules,
    select_adapters,
    weights_of,
)
from surgery_adaption_prompt.store import AdapterStore
from surgery_adaption_prompt.text_init import Tokenizer, prompts_from_text
from surgery_core import (
    BASE,
    BoundRule,
    Loans,
    OptionsError,
    Plan,
    Selection,
    Sharing,
    SwapState,
    VariantError,
    require_names,
)


class AdapterManager(BaseFacade):
    """A base model with adapters, of which one, or a composition of some, is in it; abstract.

    Args:
        model: The base model.
        store: Adapters on disk, which are loaded when they are asked for.
    """

    def __init__(self, model: PreTrainedModel, *, store: AdapterStore | None) -> None:
        super().__init__(model)
        self.store = store
        self.swap_state = SwapState(model)
        self.sharing = Sharing(self.swap_state)
        self.peft_config: dict[str, AdaptionPromptConfig] = {}
        self._derived: Derived | None = None
        self._rows: FixedRows | None = None
        self._latest: tuple[AdaptionPromptConfig, Plan] | None = None

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
        with self.sharing.lock:
            self._add(adapter_name, config, state, tokenizer=tokenizer)
            self._select_first(adapter_name)

    def set_adapter(self, adapter_name: Choice) -> None:
        """Make an adapter the active one; while disabled, the one that `enable_*` will activate.

        Args:
            adapter_name: Its name; or names with weights, as a mapping or a `Composition`, for the
                weighted sum of several.

        Raises:
            VariantError: There is no such adapter.
            OptionsError: It cannot be active beside others.
        """
        with self._loaded([adapter_name]), self.sharing.lock:
            if isinstance(adapter_name, str):
                require_names([adapter_name], self.peft_config)
                self._activate(adapter_name)
            else:
                composition = Composition(weights_of(adapter_name))
                require_names(composition.weights, self.peft_config)
                self._compose(composition)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, the first of the others becomes so.

        Raises:
            VariantError: There is no such adapter, or it is in use beside others, or by a thread.
        """
        with self.sharing.lock:
            self._require_unshared(adapter_name)
            others = [name for name in self.peft_config if name != adapter_name]
            then = others[0] if others and adapter_name == self.swap_state.selected else None
            self.swap_state.delete(adapter_name, then=then)
            del self.peft_config[adapter_name]

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Give an adapter another name.

        Raises:
            VariantError: There is no such adapter, it is in use beside others or by a thread, or
                the new name is taken or no name for a folder.
        """
        with self.sharing.lock:
            check_name(new_name, [name for name in self.peft_config if name != adapter_name])
            self._require_unshared(adapter_name)
            self.swap_state.rename(adapter_name, new_name)
            self.peft_config = {
                new_name if name == adapter_name else name: config
                for name, config in self.peft_config.items()
            }

    def enable_adapter_layers(self) -> None:
        """Put the selected adapter's modules back in the model; harmless when they are there."""
        with self.sharing.lock:
            self.sharing.enable()

    def disable_adapter_layers(self) -> None:
        """Take the active adapter's modules out of the model; harmless when they are out.

        The base computes then, also for rows and in threads inside `activated`.
        """
        self.sharing.disable()

    @contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """Run the base model for a while; may be nested.

        This is for the whole model, as in PEFT, and wins over `activated` and `adapter_names`: rows
        and other threads get the base too, until the last such block ends.
        """
        with self.sharing.disabled(self.enable_adapter_layers):
            yield self

    @contextmanager
    def activated(self, adapters: Choice | Sequence[Choice]) -> Iterator[Self]:
        """Use adapters in this thread or asyncio task only.

        Disabling wins: while the adapters are disabled, by whatever thread, the base computes here
        too. No other thread inherits the block, as those of executors, `DataParallel` or
        `generate_batch`: while it is open they are refused, until they enter one themselves or pass
        `adapter_names`. The main thread goes on with the active adapter, and so does other code of
        this thread. Compiled code refuses to run inside; see `fixed_rows`.

        Args:
            adapters: An adapter's name, names with weights, or `"__base__"`; or a list with one of
                them for each row of the batch. A batch of n times as many rows gives each to n rows
                in succession, as beam search lays them out.

        Raises:
            OptionsError: An adapter cannot share a batch with others.
            VariantError: There is no such adapter.
        """
        choices = choices_of(adapters)
        with self._loaded(choices), self.sharing.using(lambda: self._select(choices)):
            yield self

    @contextmanager
    def fixed_rows(self, max_rows: int, *, adapter_len: int | None = None) -> Iterator[FixedRows]:
        """Give rows adapters of their own through buffers, so that nothing is compiled anew.

        What was active counts as active meanwhile, and is so again at the end.

        Args:
            max_rows: The most rows a batch may have.
            adapter_len: The longest prompt there is room for, in tokens; None for that of the
                adapters there are.

        Raises:
            OptionsError: A size is less than 1, the adapters are disabled, there is none, or one is
                merged or has rows already.
        """
        with self.sharing.lock:
            before = self._selected_choice()
            self._require_enabled("fixed_rows")
            prompts = [prompt_modules(name, self.swap_state) for name in self.peft_config]
            rule = fixed_rows_rule(prompts, max_rows=max_rows, adapter_len=adapter_len)
            derived = Derived(kind=ROWS, variant=self._derived_name(ROWS), choice=before)
            self._derive(rule, derived)
            modules = cast("dict[str, AdaptedAttention]", self.swap_state.variant(derived.variant))
            rows = self._rows = FixedRows(modules, self._rows_of, max_rows=max_rows)
        try:
            yield rows
        finally:
            if self._derived is derived:
                self.set_adapter(before)

    def unload(self) -> PreTrainedModel:
        """Remove every adapter and return the base as it was.

        Trainable flags are restored too, unless the model has trainable parameters of others by
        now, such as LoRA's, for which the base has to stay frozen.

        Raises:
            DriftError: Somebody replaced a module of the active adapter; nothing was changed.
            VariantError: A thread uses an adapter.
        """
        with self.sharing.lock:
            for name in self.peft_config:
                if self.sharing.is_used(name):
                    self._require_unshared(name)
            self.swap_state.disable()
            if not self.sharing.is_in_use:
                # What a context could not take out when it ended.
                self.swap_state.underlay({})
            self._forget_derived()
            for name in list(self.peft_config):
                self.delete_adapter(name)
            frozen = {id(parameter) for parameter in self._freezing.flagged}
            others = [p for p in self.model.parameters() if id(p) not in frozen]
            # Whoever trains parameters of their own by now wants the base frozen.
            if not any(parameter.requires_grad for parameter in others):
                self._freezing.rollback()
        return self.model

    @property
    def active_adapter(self) -> str | list[str] | None:
        """Name of the selected adapter, as in PEFT also while disabled; None without adapters.

        A list if a composition is selected.
        """
        names = self.active_adapters
        if self.active_composition is not None:
            return names
        return names[0] if names else None

    @property
    def active_adapters(self) -> list[str]:
        """Names of the selected adapters, sorted."""
        return sorted(weights_of(self._selected_choice()))

    @property
    def active_composition(self) -> Composition | None:
        """The selected composition; None if a single adapter is selected, or none."""
        choice = self._selected_choice()
        return choice if isinstance(choice, Composition) else None

    def is_in_use(self, adapter_name: str) -> bool:
        """Tell whether an adapter is selected, alone or with others, or used by a thread or rows."""
        assigned = () if self._rows is None else self._rows.names
        used = adapter_name in self.active_adapters or adapter_name in assigned
        return used or self.sharing.is_used(adapter_name)

    def adapter_bytes(self, adapter_name: str) -> int:
        """Return how many bytes the tensors of an adapter take.

        Raises:
            VariantError: There is no such adapter.
        """
        with self.sharing.lock:
            state = adapter_state(self.swap_state.variant(adapter_name))
        return sum(tensor.nbytes for tensor in state.values())

    def adapter_modules(self, adapter_name: str) -> dict[str, AdaptedAttention]:
        """Return the modules of an adapter by FQN in the base, wherever they are now.

        Raises:
            VariantError: There is no such adapter.
        """
        check_adapter_name(adapter_name)
        with self.sharing.lock:
            found = self.swap_state.variant(adapter_name)
        return {fqn: m for fqn, m in found.items() if isinstance(m, AdaptedAttention)}

    def recompute_contexts(self) -> Contexts:
        """Return contexts for a checkpointed forward, and for doing it again with what it got.

        What `torch.utils.checkpoint` takes as `context_fn`.
        """
        forward, again = self.sharing.recompute_contexts(
            self._choice, self.activated, self._require_unmerged
        )
        return forward, with_features_of_now(again)

    def _select(self, choices: Sequence[Choice]) -> Selection:
        self._require_unmerged()
        return select_adapters(self.swap_state, self.peft_config, choices)

    def _require_unmerged(self) -> None:
        """Refuse other adapters than the active one where that one is in the base's weights."""
        if self._kind() == MERGED:
            msg = (
                "Model has a merged adapter: expected none while rows or threads have adapters of "
                "their own, since they would get its bias too. Call unmerge_adapter first."
            )
            raise OptionsError(msg)

    def _choice(self) -> Choice:
        """Return what is active now, disabled or not enabled counting as the base."""
        if not self.swap_state.is_enabled:
            return BASE
        return self._selected_choice()

    def _selected_choice(self) -> Choice:
        """Return what is selected; the base if nothing is."""
        selected = self.swap_state.selected
        if self._derived is not None:
            return self._derived.choice
        return BASE if selected is None else selected

    def _kind(self) -> str | None:
        return self._derived.kind if self._derived is not None else None

    def _activate(self, variant: str) -> None:
        """Select a variant, and forget what is derived and no longer selected."""
        if self.sharing.is_in_use:
            self.sharing.require_shareable(variant)
        self.swap_state.set(variant)
        if self._derived is not None and self._derived.variant != variant:
            self._forget_derived()

    def _forget_derived(self) -> None:
        if self._derived is not None:
            self.swap_state.delete(self._derived.variant)
            self._derived = None
        if self._rows is not None:
            self._rows.is_open = False
            self._rows = None

    def _derive(self, rule: BoundRule, derived: Derived, *, loans: Loans | None = None) -> None:
        """Add a variant made of adapters, and select it."""
        plan = Plan.draft(self.model, [rule], originals=self.swap_state.originals())
        self.swap_state.add(derived.variant, plan, loans=loans)
        try:
            self._share(derived.variant)
            self._activate(derived.variant)
        except BaseException:
            self.swap_state.delete(derived.variant)
            raise
        self._derived = derived

    def _derived_name(self, kind: str) -> str:
        """Return a name for a variant that is not taken by the one it replaces."""
        taken = self._derived.variant if self._derived is not None else None
        return kind if kind != taken else f"{kind}'"

    def _compose(self, composition: Composition) -> None:
        if self._selected_choice() == composition and self._kind() == COMPOSED:
            return
        modules = {name: prompt_modules(name, self.swap_state) for name in composition.weights}
        derived = Derived(kind=COMPOSED, variant=self._derived_name(COMPOSED), choice=composition)
        composed = composed_adapters(composition, modules)
        self._derive(composed.rule, derived, loans=composed.loans)

    def _rows_of(self, adapter_names: Sequence[str]) -> Rows:
        with self._loaded(adapter_names), self.sharing.lock:
            found = select_adapters(self.swap_state, self.peft_config, adapter_names).rows
            return {fqn: entries_of(rows) for fqn, rows in found.items()}

    def _loaded(self, choices: Iterable[Choice]) -> AbstractContextManager[None]:
        """Keep adapters loaded from the store, if there is one, until they are in use."""
        if self.store is None:
            return nullcontext()
        wanted = {name for choice in choices for name in weights_of(choice)}
        return self.store.lease(self, sorted(wanted))

    def _require_enabled(self, what: str) -> None:
        """Refuse what would have no effect while the adapters are disabled, or without any."""
        if not self.peft_config or not self.swap_state.is_enabled:
            reason = "disabled" if self.peft_config else "none"
            msg = f"{what} has nothing to work on: expected enabled adapters, got {reason}."
            raise OptionsError(msg)
        if self._kind() in (MERGED, ROWS):
            got = "one that is merged" if self._kind() == MERGED else "fixed rows"
            msg = (
                f"{what} has nothing to work on: expected an active adapter or composition, got "
                f"{got}. Activate an adapter first."
            )
            raise OptionsError(msg)

    def _require_unshared(self, name: str) -> None:
        """Refuse to take away an adapter that others than `set_adapter(name)` use."""
        check_adapter_name(name)
        users = []
        if self.sharing.is_used(name):
            users.append("a thread or task")
        if self._derived is not None and name in self.active_adapters:
            users.append(f"what is active ({self._derived.choice})")
        if self._rows is not None and name in self._rows.names:
            users.append("fixed_rows")
        if users:
            msg = (
                f"Adapter {name!r} is in use by {' and '.join(users)}: expected one that is not. "
                "Activate another adapter, or wait."
            )
            raise VariantError(msg)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles have locks, and threads, of their own.
        return {**vars(self), "sharing": None, "_latest": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.sharing = Sharing(self.swap_state)
        # Listeners of the original's threads are nobody's here.
        self.swap_state.underlay({})
        for name in self.swap_state.names:
            self._share(name)

    def _share(self, variant: str) -> None:
        """Let the modules of a variant be asked for what threads use."""
        self.sharing.attach(self.swap_state.variant(variant).values())

    def _add(
        self,
        name: str,
        config: AdaptionPromptConfig,
        state: Mapping[str, Tensor] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_name(name, self.peft_config)
        check_config(config, name=name)
        check_state(state)
        if config.init_from_text is not None and state is None and tokenizer is None:
            msg = (
                f"Adapter {name!r} starts from a text: expected the base's tokenizer, got none. "
                "Pass tokenizer=, or leave init_from_text out."
            )
            raise OptionsError(msg)
        self.swap_state.add(name, self._plan(config))
        try:
            if state is not None:
                load_state_(self.swap_state.variant(name), state)
            elif config.init_from_text is not None and tokenizer is not None:
                self._start_from_text(name, config.init_from_text, tokenizer)
        except BaseException:
            self.swap_state.delete(name)
            raise
        self._share(name)
        self.peft_config[name] = config

    def _select_first(self, name: str) -> None:
        """Select an adapter that was just added if nothing is selected; delete it if that fails."""
        if self.swap_state.selected is None:
            try:
                self.swap_state.set(name)
            except BaseException:
                self.delete_adapter(name)
                raise

    def _plan(self, config: AdaptionPromptConfig) -> Plan:
        """Plan an adapter, or look at the latest plan: adapters of one form come in numbers."""
        originals = self.swap_state.originals()
        if self._latest is not None:
            known, plan = self._latest
            if known == config and plan.sees_same_modules(originals=originals):
                return plan
        plan = Plan.draft(self.model, adapter_rules(self.model, config), originals=originals)
        self._latest = config, plan
        return plan

    def _start_from_text(self, name: str, text: str, tokenizer: Tokenizer) -> None:
        modules = self.adapter_modules(name)
        with self.swap_state.disabled():
            prompts = prompts_from_text(self.model, modules, text, tokenizer)
        load_state_(modules, {**adapter_state(modules), **prompts})
