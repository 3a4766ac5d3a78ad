"""The only file that names transformers internals: find attention modules, and tap their query.

transformers 5 hands `(module, query, key, value, mask, ...)`, with the query already normed and
rotated, to the function found in `ALL_ATTENTION_FUNCTIONS` under
`module.config._attn_implementation`. A wrapped attention gets a view of its configuration that
names our function there. Ours calls the base's and adds the prompt's term.
"""

import dis
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Cache,
    ContinuousBatchingConfig,
    EncoderDecoderCache,
    PretrainedConfig,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.peft import PeftAdapterMixin
from transformers.pytorch_utils import Conv1D

from surgery_adaption_prompt.attention import KEPT, TERMS, AdaptedAttention, undispatched
from surgery_adaption_prompt.kept import KeptPrompts
from surgery_adaption_prompt.parts import AttentionCall
from surgery_adaption_prompt.projections import (
    FusedProjection,
    InterleavedProjection,
    Projections,
    SeparateProjections,
)
from surgery_adaption_prompt.spread_heads import own_part
from surgery_core import ContractError, listed, whole_module

SEAM_KEY = "surgery_adaption_prompt"
"""Name of our function among transformers' attention functions."""

T = TypeVar("T")

Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]
"""For a forward of a checkpointed layer, and for doing it again."""

_CHECKPOINT = "_gradient_checkpointing_func"
_TABLE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
_LINEAR_CLASSES = frozenset({nn.Linear, Conv1D})
_CACHE_NAMES = ("cache", "past_key_values", "layer_past")


KNOWN_CLASSES: Mapping[str, Projections] = {
    "GPT2Attention": FusedProjection("c_attn"),
    "GPTNeoXAttention": InterleavedProjection("query_key_value"),
    "PersimmonAttention": InterleavedProjection("query_key_value"),
    "Phi3Attention": FusedProjection("qkv_proj"),
    "Phi4MultimodalAttention": FusedProjection("qkv_proj"),
}
"""Attention classes, by name, whose keys and values come from a fused projection we know."""

REFUSED_CLASSES: Mapping[str, str] = {
    "BltSelfAttention": "is in four stacks of layers, one of which only cuts the text into patches",
    "DiffLlamaAttention": "calls its attention function twice, with parts of the values",
    "HrmTextAttention": "runs several times in one pass",
    "MllamaTextCrossAttention": "attends to images, not to the text",
}
"""Attention classes, by name, for which the method is not defined, and why."""


NAME_READERS: Mapping[str, str] = {"GPT2Attention": "reorder_and_upcast_attn"}
"""Attention classes that look at their attention function's name only if an attribute is true."""

_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")

_UNPROJECTED_IN_PEFT: Mapping[str, bool] = {"GPT2Attention": True}

BASE_ADAPTER_METHODS = frozenset(name for name in vars(PeftAdapterMixin) if name[0] != "_")
"""Methods of every transformers model that manage PEFT's adapters, not ours."""


@dataclass(frozen=True)
class TransformersAttention:
    """How to adapt attention modules of one class.

    Args:
        attention_class: The class.
        projections: How to get keys and values of a prompt.
        functions: The table of attention functions that the class's code looks in.
        eager: The function its code falls back to, under the name `eager`.
        cache_name: Name of the KV cache among the arguments of its forward; empty if it has none,
            or would not hand on arguments of ours.
    """

    attention_class: type[nn.Module]
    projections: Projections
    functions: AttentionInterface
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    cache_name: str

    @classmethod
    def of_class(cls, found: type[nn.Module], projections: Projections) -> "TransformersAttention":
        """Look up what the code of an attention class uses."""
        forward = _forward(found)
        code_globals = forward.__globals__
        return cls(
            found, projections, code_globals[_TABLE], code_globals[_EAGER], _cache_name(forward)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles name the class; the tables are transformers' own and are not copied.
        return TransformersAttention.of_class, (self.attention_class, self.projections)

    def seam_config(self, base: nn.Module) -> PretrainedConfig:
        """Return a live view of the base's configuration that names our attention function."""
        if SEAM_KEY not in self.functions:
            AttentionInterface.register(SEAM_KEY, _attend_with_prompt)
        config = _config_of(base)
        cls = _view_class(type(config))  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's
        view = cls.__new__(cls)
        # One dictionary for both: what is set on the model's configuration later holds here too.
        view.__dict__ = config.__dict__
        return view

    def base_function(self, attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """Return the attention function the base would use now."""
        # The view hides only the property; the name the model chose is under it.
        name = _config_of(attention)._attn_implementation_internal  # noqa: SLF001 (what the property reads)
        function = self.functions.get_interface(cast("str", name), self.eager)
        return cast("Callable[..., tuple[Tensor, Tensor | None]]", function)

    def project(
        self, attention: nn.Module, prompt: Tensor, *, head_dim: int
    ) -> tuple[Tensor, Tensor]:
        """Return keys `(kv_heads, prompt_len, head_dim)` and values of a prompt.

        The base's key norm is not applied, as in the paper and litgpt.
        """
        key, value = self.projections(attention, prompt)
        # (1, prompt_len, kv_heads * head_dim) -> (kv_heads, prompt_len, head_dim)
        key = key.view(prompt.shape[1], -1, head_dim).transpose(0, 1)
        # As many heads as the keys; their size may be another.
        return key, value.view(prompt.shape[1], len(key), -1).transpose(0, 1)

    def project_whole(
        self, attention: nn.Module, prompt: Tensor, *, head_dim: int
    ) -> tuple[Tensor, Tensor]:
        """Do what `project` does for the heads of all processes; every process must call this."""
        table = attention._modules  # noqa: SLF001 (torch's registry)
        stand_in = nn.Module()
        vars(stand_in)["config"] = _config_of(attention)
        for name in self.projections.names:
            stand_in.add_module(name, whole_module(cast("nn.Module", table[name])))
        return self.project(stand_in, prompt, head_dim=head_dim)

    def own_gate(self, attention: nn.Module, gate: Tensor, *, heads: int) -> Tensor:
        """Return the part of a gate that is for the heads this process has, of all that there are.

        Raises:
            ContractError: They are not blocks of equal size, one after the other.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return gate
        _, total = self.sizes(attention)
        if heads == total:
            return gate
        # Tensor parallelism gave each process some output features of each projection.
        separate = isinstance(self.projections, SeparateProjections)
        first = attention.get_submodule(self.projections.names[0])
        part = own_part(gate, first.parameters(), heads=heads, total=total) if separate else None
        if part is None:
            name = type(attention).__name__
            _refuse(name, f"equal parts of {total} heads in each process, of separate projections", f"{heads} here",
                    "Spread the model over a number of processes that divides its heads.")  # fmt: skip
        return cast("Tensor", part)

    def linear_projections(self, attention: nn.Module) -> Sequence[nn.Module] | None:
        """Return the modules that `project` calls; None if they are not known to be linear."""
        found = [attention.get_submodule(name) for name in self.projections.names]
        return found if all(type(module) in _LINEAR_CLASSES for module in found) else None

    def kept_prompts(
        self, attention: nn.Module, arguments: Mapping[str, Any]
    ) -> KeptPrompts | None:
        """Return the prompts kept in the KV cache that a forward was called with.

        They are as old as the base's keys and values in it: where it has none of this layer's,
        nothing is kept. Compiled and traced code, and passes with gradients, keep nothing.
        """
        cache = arguments.get(self.cache_name)
        if not isinstance(cache, Cache):
            return None
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # not in its stubs
        if is_traced or torch.is_grad_enabled():
            # What is there may be older than what this pass puts in the cache.
            setattr(cache, KEPT, None)
            return None
        kept: KeptPrompts | None = vars(cache).get(KEPT)
        if kept is None:
            kept = KeptPrompts()
            setattr(cache, KEPT, kept)
        adapted = cast("AdaptedAttention", attention)
        if not _has_keys(cache, cast("int", attention.layer_idx)):
            kept.found.pop(adapted.base_attention, None)
        return kept

    def sizes(self, base: nn.Module) -> tuple[int, int]:
        """Return the hidden size and the number of attention heads."""
        config = _config_of(base)
        # Some models have layers of another width, or number of heads, than the configuration says.
        width = None
        if isinstance(self.projections, SeparateProjections):
            width = getattr(base.get_submodule(self.projections.key), "in_features", None)
        heads = getattr(base, "num_heads", None)
        return (
            config.hidden_size if width is None else width,
            config.num_attention_heads if heads is None else heads,
        )

    def head_dim(self, base: nn.Module) -> int:
        """Return the size of a head's queries."""
        config = _config_of(base)
        # One after the other: some configurations refuse to say what differs from layer to layer.
        sizes = (
            getattr(owner, name, None)
            for owner, name in ((base, "head_dim"), (base, "head_size"), (config, "head_dim"))
        )
        found = next((size for size in sizes if size is not None), None)
        return cast("int", found or config.hidden_size // config.num_attention_heads)

    def output_projection(self, base: nn.Module, *, fqn: str) -> str:
        """Return the name of the projection that follows the attention.

        Raises:
            ContractError: None of the names known, or more than one.
        """
        found = [name for name, _ in base.named_children() if name in _OUTPUT_PROJECTIONS]
        if len(found) != 1:
            children = listed([name for name, _ in base.named_children()])
            _refuse(fqn, f"one output projection of {listed(_OUTPUT_PROJECTIONS)}", children,
                    "Keep the adapter in the model.")  # fmt: skip
        return found[0]

    def may_skip_projection(self, base: nn.Module) -> bool:  # noqa: ARG002 (one class, one answer)
        """Tell whether adapters for such a module may add their terms after the output projection."""
        return _known(self.attention_class, _UNPROJECTED_IN_PEFT) is not None

    def peft_problem(self, attention: nn.Module, *, project_output: bool) -> str | None:
        """Return why PEFT 0.21.2 would compute something else with the same tensors, or could not.

        Source: peft/tuners/adaption_prompt/config.py and layer.py.
        """
        name = self.attention_class.__name__
        if name == "GPT2Attention":
            return "PEFT adds GPT-2's term after the output projection" if project_output else None
        if name not in {"LlamaAttention", "MistralAttention"}:
            return f"PEFT has no adaption prompts for {name}"
        if not project_output:
            return f"PEFT sends the term through the output projection of {name}"
        if cast("nn.Linear", attention.o_proj).bias is not None:
            return "PEFT adds the output projection's bias a second time"
        hidden, heads = self.sizes(attention)
        if hidden != heads * cast("int", attention.head_dim):
            return "PEFT expects num_attention_heads * head_dim to be hidden_size"
        return None


def attention_modules(tree: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the decoder self-attention modules of a tree by FQN, lowest layer first.

    A module counts when its code asks transformers' attention interface, it has a layer index, and
    it does not say that it is not causal, as attention to an encoder does, or that it is to images.
    """
    # By identity: a module with two FQNs is one layer, under the first of them.
    first = {id(module): fqn for fqn, module in reversed(list(tree.items()))}
    found = {
        fqn: module
        for fqn, module in tree.items()
        if first[id(module)] == fqn
        and isinstance(getattr(module, "config", None), PretrainedConfig)
        and isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", True)
        and not getattr(module, "is_cross_attention", False)
        and _uses_interface(type(module))
    }
    return dict(sorted(found.items(), key=lambda item: cast("Any", item[1]).layer_idx))


def refused_reason(module: nn.Module) -> str | None:
    """Return why the method is not defined for an attention module; None if it is, as far as known."""
    return _known(type(module), REFUSED_CLASSES)


def architecture_of(module: nn.Module, *, fqn: str) -> TransformersAttention:
    """Return how to adapt an attention module.

    Raises:
        ContractError: It is adapted already, or is no attention module we know how to adapt.
    """
    if isinstance(module, AdaptedAttention):
        _refuse(fqn, "a base attention module", f"{type(module).__name__}, adapted already",
                "Remove the adapter first, or add this one to the model that holds it.")  # fmt: skip
    name = type(module).__name__
    if not _uses_interface(type(module)):
        _refuse(fqn, "an attention module that uses transformers' attention interface", name,
                "Select the attention modules, for example 'model.layers.*.self_attn'.")  # fmt: skip
    # accelerate's dispatch is carried over to the wrapper.
    if "forward" in vars(undispatched(module)):
        _refuse(fqn, "a module with its class's own forward", f"{name} with a patched forward",
                "Remove what patched it (accelerate's dispatch hooks, for example) first.")  # fmt: skip
    reason = refused_reason(module)
    if reason is not None:
        _refuse(fqn, "one attention to the text for each pass", f"{name}, which {reason}",
                "This architecture is not supported.")  # fmt: skip
    if _acts_on_name(module):
        _refuse(fqn, "a forward that only looks its attention function up", f"{name}, which does more by that function's name",
                "This architecture is not supported.")  # fmt: skip
    projections = _projections(module)
    if projections is None:
        children = [child for child, _ in module.named_children()]
        _refuse(fqn, "projections named k_proj and v_proj, or key and value", f"{name} with {listed(children)}",
                "This architecture is not supported.")  # fmt: skip
    return TransformersAttention.of_class(type(module), cast("Projections", projections))


def is_unprojected_in_peft(model: nn.Module) -> bool:
    """Tell whether PEFT adds the terms of this model's adapters after the output projections."""
    return any(_known(type(module), _UNPROJECTED_IN_PEFT) for module in model.modules())


def enable_checkpointing(model: nn.Module, options: Mapping[str, Any], **kwargs: Any) -> None:  # noqa: ANN401 (the base's own)
    """Let a model recompute activations in the backward pass, by the method it has for that.

    Args:
        model: A model of transformers.
        options: For `torch.utils.checkpoint`.
        **kwargs: What else its method takes.
    """
    # The older name is deprecated from transformers 5.23 on.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        enable = cast("Any", model).gradient_checkpointing_enable
    enable(dict(options), **kwargs)


def recompute_in(model: nn.Module, contexts: Callable[[], Contexts]) -> None:
    """Let a model that checkpoints its layers compute them again in contexts of its forward.

    Args:
        model: `enable_checkpointing` has been called for it.
        contexts: Gives a context for a forward, and one for doing it again.
    """
    for module in model.modules():
        checkpoint = vars(module).get(_CHECKPOINT)
        if checkpoint is not None:
            setattr(module, _CHECKPOINT, partial(_checkpoint_in, checkpoint, contexts))


def _checkpoint_in(
    checkpoint: Callable[..., Any],
    contexts: Callable[[], Contexts],
    function: Callable[..., Any],
    *args: Any,  # noqa: ANN401 (a layer's own)
    **kwargs: Any,  # noqa: ANN401 (same)
) -> Any:  # noqa: ANN401 (same)
    # A compiled graph recomputes what it traced, and takes no contexts of this kind.
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, **kwargs)
    return checkpoint(function, *args, context_fn=contexts, **kwargs)


def without_block_sharing(
    config: ContinuousBatchingConfig | None, generation_config: object
) -> ContinuousBatchingConfig:
    """Return a configuration in which requests that begin alike share no keys of their texts."""
    given = config or getattr(generation_config, "continuous_batching_config", None)
    return replace(given or ContinuousBatchingConfig(), allow_block_sharing=False)


def _attend_with_prompt(
    module: AdaptedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,  # noqa: ANN401 (passed on untouched)
) -> tuple[Tensor, Tensor | None]:
    """Call the base's attention function, and add the prompt's term to its output."""
    architecture = cast("TransformersAttention", module.architecture)
    terms, kept = kwargs.pop(TERMS, None), kwargs.pop(KEPT, None)
    function = architecture.base_function(module)
    output, weights = function(module, query, key, value, attention_mask, **kwargs)
    if kept is not None and query.is_cuda and torch.cuda.is_current_stream_capturing():
        # A replay would use what is kept now, whatever has changed by then.
        kept = None
    # What transformers' own functions fall back to.
    default = query.shape[-1] ** -0.5
    scaling = kwargs.get("scaling")
    call = AttentionCall(
        query=query,
        scaling=default if scaling is None else scaling,
        # Eager attention has every derivative, so its term must.
        may_fuse=function is not architecture.eager,
        kept=kept,
    )
    if terms is not None:
        # PEFT knows only this scaling, whatever the base's own is.
        term = module.prompt_term(replace(call, scaling=default), is_projected=False)
        terms.extend([] if term is None else [term])
    return module.add_prompt(output, call), weights


def _cache_name(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return next((name for name in _CACHE_NAMES if name in parameters and hands_on), "")


def _has_keys(cache: Cache, layer_idx: int) -> bool:
    """Tell whether a KV cache is known to hold keys of a layer, without waiting for a device."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layers = own.layers
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    if not isinstance(layer, CacheLayerMixin):
        return False
    # Static layers count in a tensor.
    length = cast("int | Tensor", layer.get_seq_length())
    return bool(length) if isinstance(length, int) or length.is_cpu else False


@cache
def _view_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """Return a class whose objects differ from the base's in the attention function they name."""
    members = {"_attn_implementation": property(lambda _: SEAM_KEY), "__module__": __name__}
    return type(f"Seam{base.__name__}", (base,), members)


def _projections(module: nn.Module) -> Projections | None:
    known = _known(type(module), KNOWN_CLASSES)
    if known is not None:
        return known
    children = dict(module.named_children())
    for key, value in (("k_proj", "v_proj"), ("key", "value")):
        if {key, value} <= children.keys():
            return SeparateProjections(key, value)
    return None


def _known(cls: type, table: Mapping[str, T]) -> T | None:
    """Look up a class by its name or that of a class it derives from."""
    return next((table[base.__name__] for base in cls.__mro__ if base.__name__ in table), None)


def _uses_interface(cls: type[nn.Module]) -> bool:
    forward = _forward(cls)
    code = getattr(forward, "__code__", None)
    return (
        code is not None
        and _TABLE in code.co_names
        and {_TABLE, _EAGER} <= forward.__globals__.keys()
    )


def _acts_on_name(module: nn.Module) -> bool:
    """Tell whether the module's code does by the name of its function what ours would keep from it."""
    if not _reads_name(_forward(type(module))):
        return False
    flag = _known(type(module), NAME_READERS)
    return flag is None or bool(getattr(module, flag))


@cache
def _reads_name(forward: Any) -> bool:  # noqa: ANN401 (see _forward)
    """Tell whether a forward does more by the name of its attention function than look it up."""
    names = [step.argval for step in dis.get_instructions(forward)]
    return names.count("_attn_implementation") != 1 or "is_flash_attention_requested" in names


def _forward(cls: type[nn.Module]) -> Any:  # noqa: ANN401 (a function, or what a decorator made of it)
    # An adapted class's own runs the base's.
    forwards = (
        vars(base)["forward"]
        for base in cls.__mro__
        if "forward" in vars(base) and not issubclass(base, AdaptedAttention)
    )
    return inspect.unwrap(next(forwards))


def _config_of(module: nn.Module) -> PretrainedConfig:
    return cast("PretrainedConfig", module.config)


def _refuse(fqn: str, expected: str, actual: str, fix: str) -> None:
    msg = f"Operation 'adaption_prompt' cannot work at {fqn!r}: expected {expected}, got {actual}. {fix}"
    raise ContractError(msg, fqn=fqn, expected=expected, actual=actual)
