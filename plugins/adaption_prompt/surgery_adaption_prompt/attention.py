"""`AdaptedAttention`: a base attention module with an adaption prompt added to what it computes."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any, Protocol, Self

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
TERMS = "adaption_terms"
"""Keyword by which a forward asks for its term in a list, to add it itself."""


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

    def peft_problem(self, attention: nn.Module, *, project_output: bool) -> str | None:
        """Return why PEFT would compute something else with the same tensors; None if it would not."""


class AdaptedAttention(nn.Module):
    """A base attention module that adds `o_proj(act(gate) * attention over the prompt)`.

    Never built directly: `adapt` gives an object of a class that derives from this one and from
    the base's class (as PyTorch's `fully_shard` does), so that whatever looks for the base's class
    or its attributes finds them. The object wraps the base without changing it: it shares the
    base's submodules, buffers and hook tables, runs the base's own `forward`, and differs in a
    configuration object and two parameters:

    - `adaption_prompt`, `(1, adapter_len, hidden)`: standard normal at first.
    - `adaption_gate`, `(1,)` or `(num_attention_heads,)`: zero at first.

    Invariant: with a gate of zero the output equals the base's, bit for bit. Base FQNs stay.
    """

    adaption_prompt: nn.Parameter
    adaption_gate: nn.Parameter
    base_attention: nn.Module
    adaption_config: AdaptionPromptConfig
    architecture: AttentionArchitecture
    baked: BakedPrompt | None

    def prompt_term(self, query: Tensor, *, scaling: float) -> Tensor:
        """Return the gated attention to the prompt.

        Args:
            query: `(batch, heads, query_len, head_dim)`, as the base used it.
            scaling: Factor on the logits, dimensionless.

        Returns:
            `(batch, query_len, heads, head_dim)`, dtype of `query`.
        """
        baked = self._baked(query)
        if baked is not None:
            return baked_prompt_attention(query, baked.key, baked.value, scaling=scaling)
        key, value, gate = self._prepared(query)
        return gated_prompt_attention(query, key, value, gate, scaling=scaling)

    def _prepared(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values for a query, and the gate after its activation."""
        # The projections take the base's dtype; the parameters may be kept in a wider one.
        prompt = self.adaption_prompt.to(query.dtype)
        key, value = self.architecture.project(self, prompt, head_dim=query.shape[-1])
        return key, value, activate_gate(self.adaption_gate, self.adaption_config.gate_activation)

    def _baked(self, query: Tensor) -> BakedPrompt | None:
        """Return keys and gated values that are good for this query; None if they must be computed."""
        if torch.is_grad_enabled() or self.training:
            # Training is under way, and not every optimizer's steps are counted by PyTorch.
            if self.baked is not None:
                self.baked = None
            return None
        if (
            torch.compiler.is_compiling()
            or type(query) is not Tensor
            or torch.is_autocast_enabled(query.device.type)
            or (query.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return None
        baked = self.baked
        if baked is None or baked.key.dtype is not query.dtype or not baked.sources.are_unchanged():
            self.baked = baked = self._bake(query)
        return baked

    def _bake(self, query: Tensor) -> BakedPrompt | None:
        projections = self.architecture.plain_projections(self)
        if projections is None:
            return None
        sources = Sources.of(self._parameters, (PROMPT, GATE), projections)
        if sources is None:
            return None
        key, value, gate = self._prepared(query)
        key, value = fold_gate(key, value, gate, heads=query.shape[1])
        # A gate may be too large for the dtype of the values.
        if not torch.isfinite(value).all():
            return None
        return BakedPrompt(key=key, value=value, sources=sources)

    def add_prompt(self, output: Tensor, query: Tensor, *, scaling: float) -> Tensor:
        """Add the prompt's term to what the base's attention function gave.

        Args:
            output: `(batch, query_len, heads, head_dim)`, before the output projection.
            query: `(batch, heads, query_len, head_dim)`, as the base used it.
            scaling: The base's factor on the logits, dimensionless.

        Returns:
            Same shape and dtype as `output`.
        """
        # Attention functions may return another dtype than the query's (float32 under autocast).
        return output + self.prompt_term(query, scaling=scaling).to(output.dtype)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        """Set the mode here and on the base, which shares everything else."""
        super().train(mode)
        self.base_attention.training = mode
        self.baked = None
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.baked = None
        # Parameters of the base itself may have become new objects (from or to the meta device).
        for name in self.base_attention._parameters:  # noqa: SLF001 (torch's registry)
            self.base_attention._parameters[name] = self._parameters[name]  # noqa: SLF001 (same)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles are made by adapting again.
        own = {name: self._parameters[name] for name in (PROMPT, GATE)}
        return (
            _restore,
            (self.base_attention, self.architecture, self.adaption_config, own, self.training),
        )

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return self.__reduce__()


class UnprojectedAttention(AdaptedAttention):
    """Adds the prompt's term after the output projection, for adapters that PEFT trained on GPT-2."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401 (the base's own signature)
        """Run the base's forward, and add the term to its first result."""
        terms: list[Tensor] = []
        # The base hands what it does not know on to the attention function.
        output, *rest = super().forward(*args, **kwargs, **{TERMS: terms})
        (term,) = terms
        # (batch, query_len, heads, head_dim) -> (batch, query_len, hidden)
        return output + term.flatten(2).to(output.dtype), *rest


def adapt(
    base: nn.Module, architecture: AttentionArchitecture, config: AdaptionPromptConfig
) -> AdaptedAttention:
    """Wrap one attention module with a new adaption prompt; the module is not changed.

    Args:
        base: The attention module.
        architecture: How to deal with it.
        config: Length, gate and dtype.

    Returns:
        The wrapper, on the base's device, in the base's mode.
    """
    hidden, heads = architecture.sizes(base)
    # Packed quantised layers have buffers only.
    device = next(chain(base.parameters(), base.buffers())).device
    dtype = parameter_dtype(base, config)
    prompt = torch.empty(1, config.adapter_len, hidden, device=device, dtype=dtype)
    num_gates = heads if config.gate == "head" else 1
    gate = torch.zeros(num_gates, device=device, dtype=dtype)
    trainable = not config.inference_mode
    own = {
        PROMPT: nn.Parameter(prompt.normal_(), requires_grad=trainable),
        GATE: nn.Parameter(gate, requires_grad=trainable),
    }
    return _restore(base, architecture, config, own, base.training)


def parameter_dtype(base: nn.Module, config: AdaptionPromptConfig) -> torch.dtype:
    """Return the dtype of the parameters that `adapt` adds."""
    if config.dtype is not None:
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    floating = [p.dtype for p in base.parameters() if p.dtype in (torch.float32, torch.float64)]
    return floating[0] if floating else torch.float32


def _restore(
    base: nn.Module,
    architecture: AttentionArchitecture,
    config: AdaptionPromptConfig,
    own: dict[str, nn.Parameter],
    training: bool,  # noqa: FBT001 (given by pickle)
) -> AdaptedAttention:
    mixin = AdaptedAttention if config.project_output else UnprojectedAttention
    cls = _adapted_class(mixin, type(base))  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's
    adapted = cls.__new__(cls)
    # Not __init__: the wrapper takes over the state of the base, tables shared, and makes none.
    vars(adapted).update(vars(base))
    vars(adapted).update(
        base_attention=base,
        architecture=architecture,
        adaption_config=config,
        config=architecture.seam_config(base),
        baked=None,
        training=training,
        _parameters={**base._parameters, **own},  # noqa: SLF001 (torch's registry; a table of its own keeps the base's free of ours)
    )
    return adapted


@cache
def _adapted_class(mixin: type[AdaptedAttention], base: type[nn.Module]) -> type[AdaptedAttention]:
    """Return the one class for adapted modules of a base class.

    Kept, so that modules of one base class have one class: torch.compile guards on it.
    """
    return type(f"Adapted{base.__name__}", (mixin, base), {"__module__": __name__})
