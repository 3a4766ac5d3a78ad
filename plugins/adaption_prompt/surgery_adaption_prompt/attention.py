"""`AdaptedAttention`: a base attention module with adaption prompts added to what it computes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from math import sqrt
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.parts import (
    GATE,
    PROMPT,
    Attention,
    AttentionArchitecture,
    AttentionCall,
    PromptPart,
    parameter_shapes,
    prompt_terms,
)
from surgery_core import (
    ContractError,
    Overlay,
    Shareable,
    dispatch_again,
    is_dispatched,
    replicate_,
)

TERMS = "adaption_terms"
"""Keyword by which a forward asks for its term in a list, to add it itself."""

KEPT = "adaption_kept"
"""Keyword by which a forward hands the prompts in its KV cache to the attention function."""


class Part(Protocol):
    """What adds a term: a `PromptPart`, or one that says how in `term`."""

    config: AdaptionPromptConfig


class OwnTerm(Part, Protocol):
    """A part that computes its term itself."""

    def term(self, attention: Attention, call: AttentionCall) -> Tensor:
        """Return the term, `(batch, query_len, heads, head_dim)`, dtype of the query."""


class OtherTerms(Protocol):
    """What the code that runs now gets from an attention module instead of the module's own parts."""

    def term(self, call: AttentionCall, *, is_projected: bool) -> Tensor | None:
        """Return a term as `OwnTerm.term` does; None for none."""


class AdaptedAttention(Overlay, Shareable):
    """A base attention module that adds `o_proj(act(gate) * attention over the prompt)`.

    Never built directly: `adapt` gives an object of a class that derives from this one and from
    the base's class (as PyTorch's `fully_shard` does), so that whatever looks for the base's class
    or its attributes finds them. The object wraps the base without changing it: it shares the
    base's submodules, buffers and hook tables, runs the base's own `forward`, and differs in a
    configuration object and, for each of its `parts`, two parameters. With one part they are:

    - `adaption_prompt`, `(1, adapter_len, hidden)`: standard normal at first.
    - `adaption_gate`, `(1,)` or `(num_attention_heads,)`: zero at first.

    A conditioned adapter has two more, which project the features of a row to what is added to its
    prompt: `adaption_condition_down`, `(condition_rank, condition_size)`, and
    `adaption_condition_up`, `(hidden, condition_rank)`.

    Several parts are adapters active at once, none is a place for the terms of `sharing`.

    Invariant: with gates of zero the output equals the base's, bit for bit. Base FQNs stay.
    """

    adaption_prompt: nn.Parameter
    adaption_gate: nn.Parameter
    base_attention: nn.Module
    architecture: AttentionArchitecture
    parts: tuple[Part, ...]

    @property
    def prompts(self) -> tuple[PromptPart, ...]:
        """The parts that have a prompt of their own."""
        return tuple(part for part in self.parts if isinstance(part, PromptPart))

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of these parts by name, those of each sorted by it."""
        return {name: getattr(self, name) for part in self.prompts for name in sorted(part.names)}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401 (the base's own signature)
        """Run the base's forward, and hand it the prompts that its KV cache keeps."""
        kept = self.architecture.kept_prompts(self, kwargs)
        if kept is not None:
            # The base hands what it does not know on to the attention function.
            kwargs[KEPT] = kept
        output: tuple[Any, ...] = super().forward(*args, **kwargs)
        return output

    def prompt_term(self, call: AttentionCall, *, is_projected: bool = True) -> Tensor | None:
        """Return the gated attention to the prompts.

        Args:
            call: Says for which queries.
            is_projected: The term of adapters that add it before the output projection; otherwise
                that of the others.

        Returns:
            `(batch, query_len, heads, head_dim)`, dtype of the query; None if there is none.
        """
        if self.sharing is not None and self.sharing.is_in_force:
            shared = self.sharing.terms()
            if shared is not None:
                other: OtherTerms | None = shared.get(id(self.base_attention))
                return None if other is None else other.term(call, is_projected=is_projected)
        parts = [part for part in self.parts if part.config.project_output is is_projected]
        prompts = [(self, part) for part in parts if isinstance(part, PromptPart)]
        terms = prompt_terms(prompts, call) if prompts else []
        terms += [
            cast("OwnTerm", part).term(self, call)
            for part in parts
            if not isinstance(part, PromptPart)
        ]
        return sum(terms[1:], start=terms[0]) if terms else None

    def add_prompt(self, output: Tensor, call: AttentionCall) -> Tensor:
        """Add the prompts' term to what the base's attention function gave.

        Args:
            output: `(batch, query_len, heads, head_dim)`, before the output projection.
            call: Says for which queries.

        Returns:
            Same shape and dtype as `output`.
        """
        term = self.prompt_term(call)
        # Attention functions may return another dtype than the query's (float32 under autocast).
        return output if term is None else output + term.to(output.dtype)

    @property
    def _is_full_backward_hook(self) -> bool | None:
        """How torch reads the table of backward hooks, which is the base's."""
        return self.base_attention._is_full_backward_hook  # noqa: SLF001 (torch's own)

    @_is_full_backward_hook.setter
    def _is_full_backward_hook(self, value: bool | None) -> None:
        self.base_attention._is_full_backward_hook = value  # noqa: SLF001 (same)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        """Set the mode here and on the base, which shares everything else."""
        super().train(mode)
        self.base_attention.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        super()._apply(fn, recurse)
        # With buffers of our own the table is not the base's.
        base = self.base_attention
        base._buffers.update({name: self._buffers[name] for name in base._buffers})  # noqa: SLF001 (torch's registry)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles are made by adapting again.
        base = self.base_attention
        own, buffers = (
            {name: tensor for name, tensor in table.items() if name not in theirs}
            for table, theirs in (
                (self._parameters, base._parameters),  # noqa: SLF001 (torch's registry)
                (self._buffers, base._buffers),  # noqa: SLF001 (same)
            )
        )
        return _restore, (base, self.architecture, self.parts, own, buffers, self.training)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return self.__reduce__()


class UnprojectedAttention(AdaptedAttention):
    """Also adds terms after the output projection, for adapters that PEFT trained on GPT-2."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401 (the base's own signature)
        """Run the base's forward, and add the term to its first result."""
        terms: list[Tensor] = []
        # The base hands what it does not know on to the attention function.
        output, *rest = super().forward(*args, **kwargs, **{TERMS: terms})
        for term in terms:
            # (batch, query_len, heads, head_dim) -> (batch, query_len, hidden)
            output = output + term.flatten(2).to(output.dtype)
        return output, *rest


def adapt(
    base: nn.Module,
    architecture: AttentionArchitecture,
    config: AdaptionPromptConfig,
    *,
    device: torch.device | None = None,
) -> AdaptedAttention:
    """Wrap one attention module with a new adaption prompt; the module is not changed.

    Args:
        base: The attention module.
        architecture: How to deal with it.
        config: Length, gate, condition and dtype.
        device: Of the adaption prompt; None means the base's.

    Returns:
        The wrapper, in the base's mode.
    """
    hidden, heads = architecture.sizes(base)
    if device is None:
        # Packed quantised layers have buffers only.
        device = next(_tensors(base)).device
    dtype = parameter_dtype(base, config)
    own = {}
    for name, shape in parameter_shapes(config, hidden=hidden, heads=heads).items():
        tensor = torch.empty(shape, device=device, dtype=dtype)
        # Prompts are the same in all processes that have heads of one module.
        replicate_(_start_(name, tensor), beside=base)
        own[name] = nn.Parameter(tensor, requires_grad=not config.inference_mode)
    return compose(base, architecture, [PromptPart(config)], own)


def _start_(name: str, tensor: Tensor) -> Tensor:
    """Give a parameter the values it starts with."""
    if name == PROMPT:
        return tensor.normal_()
    if name == GATE:
        return tensor.zero_()
    # As `nn.Linear` does. Neither factor has to be zero, since the gate is.
    return nn.init.kaiming_uniform_(tensor, a=sqrt(5))


def undispatched(base: nn.Module) -> nn.Module:
    """Return a module without the forward that accelerate gave it; they share everything else.

    That forward moves arguments to where the module computes, and calls the module's own. A wrapper
    gets one too. Anybody else's forward stays where it is, and so does one that also loads the
    module's own tensors with each call: it has none for those that a wrapper adds.

    Args:
        base: An attention module; not changed.
    """
    if not is_dispatched(base):
        return base
    bare = type(base).__new__(type(base))
    vars(bare).update({name: value for name, value in vars(base).items() if name != "forward"})
    return bare


def compose(
    base: nn.Module,
    architecture: AttentionArchitecture,
    parts: Sequence[Part],
    own: Mapping[str, nn.Parameter],
    *,
    buffers: Mapping[str, Tensor] | None = None,
) -> AdaptedAttention:
    """Wrap one attention module with prompts that exist; the module is not changed.

    Args:
        base: The attention module.
        architecture: How to deal with it.
        parts: What to add; none for a module that only listens to `sharing`.
        own: The parameters that the parts name.
        buffers: What else they need; not saved with the model.

    Returns:
        The wrapper, in the base's mode.
    """
    return _restore(base, architecture, tuple(parts), own, buffers or {}, base.training)


def parameter_dtype(base: nn.Module, config: AdaptionPromptConfig) -> torch.dtype:
    """Return the dtype of the parameters that `adapt` adds."""
    if config.dtype is not None:
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    wide = (torch.float32, torch.float64)
    parameters = (found for found in _tensors(base) if isinstance(found, nn.Parameter))
    return next((found.dtype for found in parameters if found.dtype in wide), torch.float32)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers; the registries are faster than `parameters()` for small modules."""
    for table in (module._parameters, module._buffers):  # noqa: SLF001 (torch's registries)
        yield from (tensor for tensor in table.values() if tensor is not None)
    for child in module._modules.values():  # noqa: SLF001 (same)
        if child is not None:
            yield from _tensors(child)


def _restore(
    base: nn.Module,
    architecture: AttentionArchitecture,
    parts: tuple[Part, ...],
    own: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    training: bool,  # noqa: FBT001 (given by pickle)
) -> AdaptedAttention:
    are_projected = all(part.config.project_output for part in parts)
    is_plain = are_projected and not architecture.may_skip_projection(base)
    mixin = AdaptedAttention if is_plain else UnprojectedAttention
    cls = _adapted_class(mixin, type(base))  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's
    adapted = cls.__new__(cls)
    # Not __init__: the wrapper takes over the state of the base, tables shared, and makes none.
    vars(adapted).update(vars(base))
    vars(adapted).update(
        base_attention=base,
        architecture=architecture,
        parts=parts,
        sharing=None,
        config=architecture.seam_config(base),
        training=training,
        _parameters={**base._parameters, **own},  # noqa: SLF001 (torch's registry; a table of its own keeps the base's free of ours)
    )
    # A property, since the table it speaks of is shared.
    del vars(adapted)["_is_full_backward_hook"]
    # Of the base, which would be called in place of the wrapper.
    vars(adapted).pop("_compiled_call_impl", None)
    if "forward" in vars(base) and not is_dispatched(base):
        msg = (
            f"Module {type(base).__name__} cannot be wrapped: expected its class's own forward, got "
            "a patched one, which would be called in place of the wrapper's. Remove what patched it."
        )
        raise ContractError(msg, fqn="", expected="its class's own forward", actual=type(base))
    dispatch_again(adapted)
    if buffers:
        vars(adapted).update(
            _buffers={**base._buffers, **buffers},  # noqa: SLF001 (same)
            _non_persistent_buffers_set=base._non_persistent_buffers_set | buffers.keys(),  # noqa: SLF001 (same)
        )
    fields = ("base_attention", "architecture", "parts", "sharing", "config")
    adapted.stand_over(base, added=own, fields=fields)
    return adapted


@cache
def _adapted_class(mixin: type[AdaptedAttention], base: type[nn.Module]) -> type[AdaptedAttention]:
    """Return the one class for adapted modules of a base class.

    Kept, so that modules of one base class have one class: torch.compile guards on it.
    """
    own = {"__module__": __name__, "overlay_kind": mixin}
    return type(f"Adapted{base.__name__}", (mixin, base), own)
