"""Adapters merged into a model, and derived state that follows what it is derived from."""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from surgery_adaption_prompt.adapters import AdapterManager
from surgery_adaption_prompt.condition import require_unconditioned
from surgery_adaption_prompt.merged_bias import Share, merged_bias_rule, merged_projections
from surgery_adaption_prompt.merged_saving import bias_room, missing_biases, refuse_to_save
from surgery_adaption_prompt.selection import MERGED, Derived, prompt_modules, weights_of
from surgery_core import OptionsError, Plan, VariantError


class MergingManager(AdapterManager):
    """Adapters of which those of one token can be merged; abstract."""

    def merge_adapter(self) -> None:
        """Add what is active as constants at the output projections; for `adapter_len=1` only.

        No attention to the prompt is computed then, only its value in each layer, in every pass, so
        that adapters and base may go on changing; equal up to rounding. Activating an adapter, also
        the same one, takes it out again.

        Raises:
            OptionsError: A prompt is longer, the adapters are disabled, or there is none.
            ContractError: An output projection is of a kind that cannot be given a bias.
            StateError: A bias would not be finite in the dtype of the base.
        """
        with self.sharing.lock:
            rule = merged_bias_rule(self._active_shares(), is_final=False)
            choice = self._selected_choice()
            self._derive(rule, Derived(kind=MERGED, variant=MERGED, choice=choice))

    def unmerge_adapter(self) -> None:
        """Take back `merge_adapter`, exactly.

        Raises:
            VariantError: Nothing is merged.
        """
        if self._kind() != MERGED:
            msg = "Model has no merged adapter: expected one. Call merge_adapter first."
            raise VariantError(msg)
        # Not under the lock: a store may have to be asked, which takes its own lock first.
        self.set_adapter(self._selected_choice())

    def merge_and_unload(self) -> PreTrainedModel:
        """Write what is active into biases, remove everything else, return the base.

        Where the base has no such biases, its configuration is changed so that it has (Llama's
        `attention_bias`), with zeros for all others that come with them: the result can be saved and
        loaded. A base whose class has no room for them (Qwen2, Mistral) refuses `save_pretrained`
        from then on.

        Raises:
            OptionsError: See `merge_adapter`; nothing was changed.
            ContractError: Same.
            StateError: Same.
        """
        with self.sharing.lock:
            shares = self._active_shares()
            rule = merged_bias_rule(shares, is_final=True)
            missing = missing_biases(self.model, merged_projections(shares))
            room = bias_room(self.model, missing) if missing else None
            if room is not None:
                rule = merged_bias_rule(shares, is_final=True, zeros=room.projections)
            # Built before anything is taken out, so that whatever is refused is refused here.
            Plan.draft(self.model, [rule], originals=self.swap_state.originals()).build()
            base = self.unload()
            Plan.draft(base, [rule]).apply()
            if room is not None:
                room.take()
            elif missing:
                refuse_to_save(base, missing)
            return base

    def _active_shares(self) -> dict[str, list[Share]]:
        """Return what is active by FQN, if it can be merged."""
        self._require_enabled("merge_adapter")
        if self.sharing.is_in_use:
            msg = (
                "Nothing is merged: expected no thread that uses adapters of its own, since it would "
                "get the merged bias too. Merge when they are done."
            )
            raise OptionsError(msg)
        require_unconditioned(self.active_adapters, self.peft_config, what="Merging")
        found: dict[str, list[Share]] = {}
        for name, weight in weights_of(self._selected_choice()).items():
            for fqn, module in prompt_modules(name, self.swap_state).items():
                found.setdefault(fqn, []).append(Share.of(module, weight))
        return found

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (torch's signature)
        """Load what `state_dict` gave; rows in buffers follow the base."""
        found = super().load_state_dict(*args, **kwargs)
        self._refresh_rows()
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._refresh_rows()
        return self

    def _refresh_rows(self) -> None:
        """Give compiled code what assigned adapters have now."""
        if self._rows is not None:
            self._rows.refresh()
