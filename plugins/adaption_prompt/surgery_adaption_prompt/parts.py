"""What one adapter adds to one attention module: its term, and the keys and values kept for it."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from surgery_adaption_prompt.baked import BakedPrompt, Child, Sources
from surgery_adaption_prompt.condition import features_for
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.functional import (
    activate_gate,
    baked_prompt_attention,
    conditioned_prompt,
    fold_gate,
    gated_prompt_attention,
    gated_row_prompt_attention,
)
from surgery_core import OptionsError, Sharing

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

    def plain_projections(self, attention: nn.Module) -> Sequence[Child] | None:
        """Return what `project` calls; None unless only input and parameters decide what they give."""

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
    sharing: Sharing | None
    _parameters: Any


class PromptPart:
    """One adapter's share in an attention module: which parameters of the module are its own.

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
        self.kept: BakedPrompt | None = None
        self._epoch = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # What was kept for one module is nothing to a copy.
        return _part, (self.config, self.weight, self.names)

    def is_good(self, attention: Attention, query: Tensor) -> bool:
        """Tell whether what is kept is good for a query."""
        kept = self.kept
        return (
            kept is not None
            and kept.key.dtype is query.dtype
            and self._epoch == _epoch(attention)
            and kept.sources.are_unchanged()
        )

    def keep(self, attention: Attention, kept: BakedPrompt) -> None:
        """Keep keys and gated values until something of them changes."""
        self.kept, self._epoch = kept, _epoch(attention)

    def forget(self) -> None:
        """Drop the keys and values kept from one pass to the next."""
        self.kept = None

    def weighted(self, weight: float) -> "PromptPart":
        """Return the same share with another weight, for which nothing is kept yet."""
        return _part(self.config, weight, self.names)

    def term(
        self, attention: Attention, query: Tensor, *, scaling: float, is_training: bool
    ) -> Tensor:
        """Return the gated attention to the prompt, times the weight.

        Args:
            attention: The module that has the parameters.
            query: `(batch, heads, query_len, head_dim)`, as the base used it.
            scaling: Factor on the logits, dimensionless.
            is_training: Whether the model is in training mode.

        Returns:
            `(batch, query_len, heads, head_dim)`, dtype of `query`.

        Raises:
            OptionsError: The adapter is conditioned, and no features that fit were handed over.
        """
        if self.config.condition_size is not None:
            return self._conditioned_term(attention, query, scaling=scaling)
        baked = self.baked(attention, query, is_training=is_training)
        if baked is not None:
            return baked_prompt_attention(query, baked.key, baked.value, scaling=scaling)
        key, value, gate = self.prepared(attention, query)
        return gated_prompt_attention(query, key, value, gate, scaling=scaling)

    def _conditioned_term(self, attention: Attention, query: Tensor, *, scaling: float) -> Tensor:
        """Return the term with a prompt for each row; nothing is kept, since all of it depends on features."""
        features = features_for(query.shape[0], cast("int", self.config.condition_size))
        prompt, down, up = (
            getattr(attention, name) for name in (self.prompt_name, *self._condition_names)
        )
        # The projections take the base's dtype, as for `prepared`.
        prompts = conditioned_prompt(prompt, features, down, up).to(query.dtype)
        # (rows, prompt_len, hidden) -> (1, rows * prompt_len, hidden): one long prompt.
        found = attention.architecture.project(
            attention,  # type: ignore[arg-type]  # see prepared
            prompts.flatten(0, 1)[None],
            head_dim=query.shape[-1],
        )
        # (kv_heads, rows * prompt_len, head_dim) -> (rows, kv_heads, prompt_len, head_dim)
        key, value = (
            one.reshape(one.shape[0], *prompts.shape[:2], one.shape[-1]).transpose(0, 1)
            for one in found
        )
        return gated_row_prompt_attention(
            query, key, value, self.gate(attention, heads=query.shape[1]), scaling=scaling
        )

    def prepared(self, attention: Attention, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values for a query, and the gate after its activation, times the weight."""
        self.require_one_prompt()
        # The projections take the base's dtype; the parameters may be kept in a wider one.
        prompt = getattr(attention, self.prompt_name).to(query.dtype)
        key, value = attention.architecture.project(
            attention,  # type: ignore[arg-type]  # the protocol cannot say that it is a module
            prompt,
            head_dim=query.shape[-1],
        )
        return key, value, self.gate(attention, heads=query.shape[1])

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
        return attention.architecture.own_gate(attention, gate, heads=heads)  # type: ignore[arg-type]  # see prepared

    def baked(
        self, attention: Attention, query: Tensor, *, is_training: bool
    ) -> BakedPrompt | None:
        """Return keys and gated values that are good for a query; None if they must be computed."""
        # The way of every pass but the first, without lists. Compiled code looks at nothing kept.
        if (
            not torch.is_grad_enabled()
            and not is_training
            and _may_keep(query)
            and self.is_good(attention, query)
        ):
            return self.kept
        found = baked_together([(attention, self)], query, is_training=is_training)
        return None if found is None else found[0]


Entry = tuple[Attention, PromptPart]
"""What has the parameters of a part, and the part."""


def baked_together(
    entries: Sequence[Entry], query: Tensor, *, is_training: bool
) -> list[BakedPrompt] | None:
    """Return keys and gated values of parts at one module that are good for a query.

    Args:
        entries: Over one base module.
        query: Says dtype and shape.
        is_training: Whether the model is in training mode.

    Returns:
        For each part; None if those of one must be computed.

    Raises:
        OptionsError: One is conditioned, so that there are none.
    """
    for _, part in entries:
        part.require_one_prompt()
    if torch.is_grad_enabled() or is_training:
        # Training is under way, and not every optimizer's steps are counted by PyTorch.
        for attention, part in entries:
            if part.kept is not None:
                part.kept = None
            # Others may keep something of the same parameters: whoever uses the adapter by row or
            # in another thread.
            if attention.sharing is not None and not torch.compiler.is_compiling():
                attention.sharing.epoch += 1
        return None
    if not _may_keep(query):
        return None
    stale = [entry for entry in entries if not entry[1].is_good(entry[0], query)]
    if stale:
        _bake(stale, query)
    found = [part.kept for _, part in entries]
    for _, part in stale:
        if part.kept is not None and part.kept.sources.await_a_step():
            part.kept = None
    return None if None in found else cast("list[BakedPrompt]", found)


def _bake(entries: Sequence[Entry], query: Tensor) -> None:
    """Keep what can be watched, with one projection of all prompts."""
    for _, part in entries:
        part.kept = None
    attention = entries[0][0]
    projections = attention.architecture.plain_projections(attention)  # type: ignore[arg-type]  # see prepared
    if projections is None:
        return
    watched = [
        (at, part, sources)
        for at, part in entries
        if (sources := Sources.of(at._parameters, part.names, projections)) is not None  # noqa: SLF001 (torch's registry)
    ]
    if not watched:
        return
    prompts = [getattr(at, part.prompt_name).to(query.dtype) for at, part, _ in watched]
    keys, values = attention.architecture.project(
        attention,  # type: ignore[arg-type]  # see prepared
        torch.cat(prompts, dim=1) if len(prompts) > 1 else prompts[0],
        head_dim=query.shape[-1],
    )
    end = 0
    for (at, part, sources), prompt in zip(watched, prompts, strict=True):
        begin, end = end, end + prompt.shape[1]
        heads = query.shape[1]
        gate = part.gate(at, heads=heads)
        key, value = fold_gate(keys[:, begin:end], values[:, begin:end], gate, heads=heads)
        # A gate may be too large for the dtype of the values.
        if torch.isfinite(value).all():
            part.keep(at, BakedPrompt(key=key, value=value, sources=sources))


def _epoch(attention: Attention) -> int:
    """Return how many passes with gradients there were, over all adapters of the model."""
    return 0 if attention.sharing is None else attention.sharing.epoch


def _may_keep(query: Tensor) -> bool:
    """Tell whether what is computed for a query now may be used again."""
    return not (
        torch.compiler.is_compiling()
        or type(query) is not Tensor
        or torch.is_autocast_enabled(query.device.type)
        or (query.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _part(config: AdaptionPromptConfig, weight: float, names: tuple[str, ...]) -> PromptPart:
    return PromptPart(config, weight=weight, names=names)
