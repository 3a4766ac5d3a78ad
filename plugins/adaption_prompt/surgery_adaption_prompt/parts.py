"""The term that one adapter adds to one attention module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from surgery_adaption_prompt.condition import features_for
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.functional import (
    activate_gate,
    conditioned_prompt,
    fold_gate,
    folded_prompt_attention,
    gated_row_prompt_attention,
)
from surgery_adaption_prompt.kept import FoldedPrompts, KeptPrompts
from surgery_core import OptionsError

PROMPT = "adaption_prompt"
GATE = "adaption_gate"
CONDITION_DOWN = "adaption_condition_down"
CONDITION_UP = "adaption_condition_up"


def parameter_shapes(
    config: AdaptionPromptConfig, *, hidden: int, heads: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's parameters at one attention module, by name.

    Args:
        config: The adapter's configuration.
        hidden: Hidden size.
        heads: Number of attention heads.
    """
    shapes: dict[str, tuple[int, ...]] = {
        PROMPT: (1, config.adapter_len, hidden),
        GATE: (heads if config.gate == "head" else 1,),
    }
    if config.condition_size is not None:
        shapes[CONDITION_DOWN] = (config.condition_rank, config.condition_size)
        shapes[CONDITION_UP] = (hidden, config.condition_rank)
    return shapes


def parameter_names(config: AdaptionPromptConfig) -> tuple[str, ...]:
    """Return the names of an adapter's parameters: prompt, gate, and factors of the projection."""
    return tuple(parameter_shapes(config, hidden=1, heads=1))


class AttentionArchitecture(Protocol):
    """What adapting an attention module needs to know about the library it comes from."""

    def seam_config(self, base: nn.Module) -> object:
        """Return a configuration under which the module hands its query to `add_prompt`."""

    def project(
        self, attention: nn.Module, prompt: Tensor, *, head_dim: int
    ) -> tuple[Tensor, Tensor]:
        """Return keys of a prompt, `(kv_heads, prompt_len, head_dim)`, and values.

        Args:
            attention: The module, whose own projections are called.
            prompt: `(1, prompt_len, hidden)`.
            head_dim: Of the query.
        """

    def project_whole(
        self, attention: nn.Module, prompt: Tensor, *, head_dim: int
    ) -> tuple[Tensor, Tensor]:
        """Do what `project` does for the heads of all processes."""

    def linear_projections(self, attention: nn.Module) -> Sequence[nn.Module] | None:
        """Return the modules that `project` calls; None if they are not known to be linear."""

    def kept_prompts(
        self, attention: nn.Module, arguments: Mapping[str, Any]
    ) -> KeptPrompts | None:
        """Return the prompts kept in the KV cache that a forward was called with.

        Args:
            attention: The module; nothing of it is kept where the cache holds none of its keys.
            arguments: Keyword arguments of the forward.

        Returns:
            None if nothing may be kept for the next pass.
        """

    def sizes(self, base: nn.Module) -> tuple[int, int]:
        """Return the hidden size and the number of attention heads."""

    def head_dim(self, base: nn.Module) -> int:
        """Return the size of a head's queries."""

    def own_gate(self, attention: nn.Module, gate: Tensor, *, heads: int) -> Tensor:
        """Return the part of a gate that is for the heads this process has, of all that there are.

        Args:
            attention: The module.
            gate: `(1,)` or `(num_attention_heads,)`.
            heads: How many heads the query has here.
        """

    def output_projection(self, base: nn.Module, *, fqn: str) -> str:
        """Return the name of the projection that follows the attention."""

    def may_skip_projection(self, base: nn.Module) -> bool:
        """Tell whether adapters for such a module may add their terms after the output projection."""

    def peft_problem(self, attention: nn.Module, *, project_output: bool) -> str | None:
        """Return why PEFT would compute something else with the same tensors; None if it would not."""


class Attention(Protocol):
    """The attention module that a part belongs to."""

    architecture: AttentionArchitecture
    base_attention: nn.Module
    _parameters: Any


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionCall:
    """One call of the base's attention function, to which terms are added.

    Args:
        query: `(batch, heads, query_len, head_dim)`, as the base used it.
        scaling: Factor on the logits, dimensionless.
        may_fuse: Allow PyTorch's fused attention; see `gated_prompt_attention`.
        kept: Prompts in the KV cache; None for none.
    """

    query: Tensor
    scaling: float
    may_fuse: bool = True
    kept: KeptPrompts | None = None


class PromptPart:
    """What an adapter adds to an attention module, which has its parameters.

    Args:
        config: The adapter's configuration.
        weight: Factor on its term, dimensionless.
        names: Names that its parameters have in the module, in the order of `parameter_names`; None
            for just those.
    """

    def __init__(
        self,
        config: AdaptionPromptConfig,
        *,
        weight: float = 1.0,
        names: tuple[str, ...] | None = None,
    ) -> None:
        self.config = config
        self.weight = weight
        self.names = parameter_names(config) if names is None else names
        self.prompt_name, self.gate_name, *self._condition_names = self.names

    def weighted(self, weight: float) -> "PromptPart":
        """Return the same share with another weight."""
        return PromptPart(self.config, weight=weight, names=self.names)

    def conditioned_term(self, attention: Attention, call: AttentionCall) -> Tensor:
        """Return the term with a prompt for each row, as the features of that row make it."""
        query = call.query
        features = features_for(query.shape[0], cast("int", self.config.condition_size))
        prompt, down, up = (
            getattr(attention, name) for name in (self.prompt_name, *self._condition_names)
        )
        # The projections take the base's dtype, as for `folded_prompts`.
        prompts = conditioned_prompt(prompt, features, down, up).to(query.dtype)
        # (rows, prompt_len, hidden) -> (1, rows * prompt_len, hidden): one long prompt.
        found = attention.architecture.project(
            attention,  # type: ignore[arg-type]  # the protocol cannot say that it is a module
            prompts.flatten(0, 1)[None],
            head_dim=query.shape[-1],
        )
        # (kv_heads, rows * prompt_len, head_dim) -> (rows, kv_heads, prompt_len, head_dim)
        key, value = (
            one.reshape(one.shape[0], *prompts.shape[:2], one.shape[-1]).transpose(0, 1)
            for one in found
        )
        return gated_row_prompt_attention(
            query,
            key,
            value,
            self.gate(attention, heads=query.shape[1]),
            scaling=call.scaling,
            may_fuse=call.may_fuse,
        )

    def require_one_prompt(self) -> None:
        """Refuse to say what the prompt is where each row has its own."""
        if self.config.condition_size is not None:
            msg = (
                "Conditioned adapter has no prompt without features: expected one that is the same "
                "for every row, as rows with adapters of their own and merging need, got "
                f"condition_size={self.config.condition_size}. Give the whole batch this adapter."
            )
            raise OptionsError(msg)

    def gate(self, attention: Attention, *, heads: int) -> Tensor:
        """Return the gate of the heads there are here, after its activation, times the weight."""
        gate = activate_gate(getattr(attention, self.gate_name), self.config.gate_activation)
        if self.weight != 1.0:
            gate = gate.to(torch.promote_types(gate.dtype, torch.float32)) * self.weight
        return attention.architecture.own_gate(attention, gate, heads=heads)  # type: ignore[arg-type]  # see conditioned_term


Entry = tuple[Attention, PromptPart]
"""What has the parameters of a part, and the part."""


def prompt_terms(entries: Sequence[Entry], call: AttentionCall) -> list[Tensor]:
    """Return the terms of adapters that the whole batch uses, at one attention module.

    Args:
        entries: The adapters.
        call: Says for which queries.

    Returns:
        For each adapter `(batch, query_len, heads, head_dim)`, dtype of the query.

    Raises:
        OptionsError: An adapter is conditioned, and no features that fit were handed over.
    """
    plain = [entry for entry in entries if entry[1].config.condition_size is None]
    pairs = iter(folded_prompts(plain, call).pairs if plain else ())
    return [
        folded_prompt_attention(
            call.query, *next(pairs), scaling=call.scaling, may_fuse=call.may_fuse
        )
        if part.config.condition_size is None
        else part.conditioned_term(attention, call)
        for attention, part in entries
    ]


def folded_prompts(
    entries: Sequence[Entry], call: AttentionCall, *, are_rows: bool = False
) -> FoldedPrompts:
    """Return keys and gated values of adapters at one attention module.

    They are computed unless the KV cache of this pass has them and the pass is for a single token:
    longer ones are worth the little that it takes.

    Args:
        entries: The adapters, at least one.
        call: Says for which queries.
        are_rows: Project all prompts together, which is faster for many, but rounds otherwise than
            each for itself.

    Raises:
        OptionsError: An adapter is conditioned, so that there are none.
    """
    query, kept = call.query, call.kept
    base = entries[0][0].base_attention
    weights = [part.weight for _, part in entries]
    # From the registries: a tensor that is computed for each access is not there.
    parameters = [at._parameters.get(name) for at, part in entries for name in part.names]  # noqa: SLF001 (torch's registry)
    if kept is not None and query.shape[2] == 1:
        found = kept.found.get(base)
        if found is not None and found.fits(parameters, weights, query):
            return found
    folded = FoldedPrompts(
        parameters=parameters,
        weights=weights,
        dtype=query.dtype,
        pairs=_fold(entries, query)
        if are_rows
        else [pair for entry in entries for pair in _fold([entry], query)],
    )
    if kept is not None and all(tensor is not None for tensor in parameters):
        kept.found[base] = folded
    return folded


def _fold(entries: Sequence[Entry], query: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return keys and gated values of adapters whose prompts are projected together."""
    for _, part in entries:
        part.require_one_prompt()
    attention, heads = entries[0][0], query.shape[1]
    # The projections take the base's dtype; the parameters may be kept in a wider one.
    prompts = [getattr(at, part.prompt_name).to(query.dtype) for at, part in entries]
    keys, values = attention.architecture.project(
        attention,  # type: ignore[arg-type]  # see conditioned_term
        torch.cat(prompts, dim=1) if len(prompts) > 1 else prompts[0],
        head_dim=query.shape[-1],
    )
    found, end = [], 0
    for (at, part), prompt in zip(entries, prompts, strict=True):
        begin, end = end, end + prompt.shape[1]
        gate = part.gate(at, heads=heads)
        found.append(fold_gate(keys[:, begin:end], values[:, begin:end], gate, heads=heads))
    return found
