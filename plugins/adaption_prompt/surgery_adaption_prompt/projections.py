"""Keys and values of a prompt, by the projections of an attention module."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

_ORDINARY_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class SeparateProjections:
    """Keys and values come from two projections, as in Llama."""

    key: str = "k_proj"
    value: str = "v_proj"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the projections in their module."""
        return self.key, self.value

    def __call__(self, attention: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prompt, `(1, prompt_len, kv_heads * head_dim)`."""
        return (
            _project(attention.get_submodule(self.key), prompt),
            _project(attention.get_submodule(self.value), prompt),
        )


@dataclass(frozen=True)
class FusedProjection:
    """Queries, keys and values come from one projection, one after the other, as in Phi-3."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """Name of the projection in its module."""
        return (self.name,)

    def __call__(self, attention: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prompt, `(1, prompt_len, kv_heads * head_dim)`."""
        fused = _project(attention.get_submodule(self.name), prompt)
        config: Any = attention.config
        heads = config.num_attention_heads
        # Not every configuration knows of grouped heads; without them there are as many as queries.
        kv_heads = getattr(config, "num_key_value_heads", heads)
        keys = fused.shape[-1] // (heads + 2 * kv_heads) * kv_heads
        key, value = fused[..., -2 * keys :].chunk(2, dim=-1)
        return key, value


@dataclass(frozen=True)
class InterleavedProjection:
    """Each head's query, key and value come one after the other, as in GPT-NeoX."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """Name of the projection in its module."""
        return (self.name,)

    def __call__(self, attention: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prompt, `(1, prompt_len, heads * head_dim)`."""
        fused = _project(attention.get_submodule(self.name), prompt)
        heads = cast("Any", attention.config).num_attention_heads
        # Seen as (1, prompt_len, heads, 3, head_dim).
        _, key, value = fused.view(1, prompt.shape[1], heads, 3, -1).unbind(dim=3)
        return key.flatten(2), value.flatten(2)


Projections = SeparateProjections | FusedProjection | InterleavedProjection


def _project(projection: nn.Module, prompt: Tensor) -> Tensor:
    """Call a projection in the dtype of its weight, if that is an ordinary one."""
    dtype = getattr(getattr(projection, "weight", None), "dtype", None)
    # Queries may be wider than the weights (after norms kept in float32). Quantised weights, or
    # none, say nothing about the input: those projections get the query's dtype.
    inputs = prompt.to(dtype) if dtype in _ORDINARY_DTYPES else prompt
    # Back to the query's dtype, whatever the projection gave.
    output: Tensor = projection(inputs).to(prompt.dtype)
    return output
