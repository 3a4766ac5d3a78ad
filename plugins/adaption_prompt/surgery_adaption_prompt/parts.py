"""What one adapter adds to one attention module: its term, and the keys and values kept for it."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from surgery_adaption_prompt.baked import BakedPrompt, Child, Sources
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.functional import (
    activate_gate,
    baked_prompt_attention,
    fold_gate,
    gated_prompt_attention,
)

PROMPT = "adaption_prompt"
GATE = "adaption_gate"


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

    def plain_projections(self, attention: nn.Module) -> Sequence[Child] | None:
        """Return what `project` calls; None unless only input and parameters decide what they give."""

    def sizes(self, base: nn.Module) -> tuple[int, int]:
        """Return the hidden size and the number of attention heads."""

    def head_dim(self, base: nn.Module) -> int:
        """Return the size of a head's queries."""

    def output_projection(self, base: nn.Module, *, fqn: str) -> str:
        """Return the name of the projection that follows the attention."""

    def may_skip_projection(self, base: nn.Module) -> bool:
        """Tell whether adapters for such a module may add their terms after the output projection."""

    def peft_problem(self, attention: nn.Module, *, project_output: bool) -> str | None:
        """Return why PEFT would compute something else with the same tensors; None if it would not."""


class Sharing(Protocol):
    """Tells the code that runs now whether it gets other terms than the module's own."""

    is_in_force: bool
    epoch: int

    def terms(self) -> Any:  # noqa: ANN401 (see attention.OtherTerms)
        """Return them; None for the module's own."""


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
        prompt_name: Name of the parameter with the prompt, `(1, adapter_len, hidden)`.
        gate_name: Name of the parameter with the gate, `(1,)` or `(num_attention_heads,)`.
    """

    def __init__(
        self,
        config: AdaptionPromptConfig,
        *,
        weight: float = 1.0,
        prompt_name: str = PROMPT,
        gate_name: str = GATE,
    ) -> None:
        self.config = config
        self.weight = weight
        self.prompt_name = prompt_name
        self.gate_name = gate_name
        self.kept: BakedPrompt | None = None
        self._epoch = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # What was kept for one module is nothing to a copy.
        return _part, (self.config, self.weight, self.prompt_name, self.gate_name)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two parameters."""
        return self.prompt_name, self.gate_name

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
        return _part(self.config, weight, self.prompt_name, self.gate_name)

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
        """
        baked = self.baked(attention, query, is_training=is_training)
        if baked is not None:
            return baked_prompt_attention(query, baked.key, baked.value, scaling=scaling)
        key, value, gate = self.prepared(attention, query)
        return gated_prompt_attention(query, key, value, gate, scaling=scaling)

    def prepared(self, attention: Attention, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values for a query, and the gate after its activation, times the weight."""
        # The projections take the base's dtype; the parameters may be kept in a wider one.
        prompt = getattr(attention, self.prompt_name).to(query.dtype)
        key, value = attention.architecture.project(
            attention,  # type: ignore[arg-type]  # the protocol cannot say that it is a module
            prompt,
            head_dim=query.shape[-1],
        )
        return key, value, self.gate(attention)

    def gate(self, attention: Attention) -> Tensor:
        """Return the gate after its activation, times the weight."""
        gate = activate_gate(getattr(attention, self.gate_name), self.config.gate_activation)
        if self.weight != 1.0:
            gate = gate.to(torch.promote_types(gate.dtype, torch.float32)) * self.weight
        return gate

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
    """
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
        key, value = fold_gate(
            keys[:, begin:end], values[:, begin:end], part.gate(at), heads=query.shape[1]
        )
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


def _part(
    config: AdaptionPromptConfig, weight: float, prompt_name: str, gate_name: str
) -> PromptPart:
    return PromptPart(config, weight=weight, prompt_name=prompt_name, gate_name=gate_name)
