"""The maths of zero-init attention, in torch alone."""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from surgery_adaption_prompt.config import GateActivation


def gated_prompt_attention(
    query: Float[Tensor, "batch heads query_len head_dim"],
    prompt_key: Float[Tensor, "kv_heads prompt_len head_dim"],
    prompt_value: Float[Tensor, "kv_heads prompt_len value_dim"],
    gate: Float[Tensor, " gates"],
    *,
    scaling: float,
    may_fuse: bool = True,
) -> Float[Tensor, "batch query_len heads value_dim"]:
    """Attend from each query position to the adaption prompt and weight the result by the gate.

    `softmax(query @ prompt_key.T * scaling) @ (gate * prompt_value)`, with a softmax of its own over
    the prompt positions, so that a gate of zero removes the prompt without a trace. The result is
    added to what the base attention gives before its output projection.

    Args:
        query: Queries as the base attention used them: after query norm and rotary embedding.
        prompt_key: Keys of the prompt, one set for each key-value head; no rotary embedding. Query
            head h uses key-value head `h // (heads // kv_heads)`.
        prompt_value: Values of the prompt.
        gate: After its activation, dimensionless; one for each query head, or a single one.
        scaling: Factor on the logits, dimensionless; the base attention's own.
        may_fuse: Allow PyTorch's fused attention, which has neither second nor forward-mode
            derivatives.

    Returns:
        The term to add, laid out as transformers' attention interface returns its output. Dtype
        of `query`. Exactly zero where the gate is zero, if keys and values are finite.

    Numerics:
        In float32 or wider, with one cast to the query's dtype at the end; for bfloat16 where no
        gradients are recorded, softmax and gate alone. Logits and gated values may thus exceed what
        float16 can hold. Autocast changes none of this.

    Source:
        Zhang et al. 2023, arXiv:2303.16199, sec. 3.2; `gate` is their g_l.

    Example:
        >>> query = torch.ones(1, 2, 1, 4)
        >>> prompt = torch.ones(1, 3, 4)
        >>> gate = torch.tensor([0.0, 0.5])
        >>> gated_prompt_attention(query, prompt, prompt, gate, scaling=0.5)[0, 0, :, 0]
        tensor([0.0000, 0.5000])
    """
    key, gated = fold_gate(prompt_key, prompt_value, gate, heads=query.shape[1])
    return folded_prompt_attention(query, key, gated, scaling=scaling, may_fuse=may_fuse)


def folded_prompt_attention(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "1 heads prompt_len head_dim"],
    gated_value: Float[Tensor, "1 heads prompt_len value_dim"],
    *,
    scaling: float,
    may_fuse: bool = True,
) -> Float[Tensor, "batch query_len heads value_dim"]:
    """Attend to the adaption prompt with the gate folded into the values already.

    Args:
        query: As for `gated_prompt_attention`.
        key: Keys of the prompt, one set for each query head, as `fold_gate` gives them.
        gated_value: Values of the prompt, times the gate of the head.
        scaling: As for `gated_prompt_attention`.
        may_fuse: As for `gated_prompt_attention`.

    Returns:
        As for `gated_prompt_attention`. Exactly zero where the gated values are zero, if the keys
        are finite.

    Numerics:
        In the dtype of `key`, which may be wider than the query's; softmax in float32 or wider.
        Autocast does not change it.

    Source:
        See `gated_prompt_attention`.

    Example:
        >>> query = torch.ones(1, 2, 1, 4)
        >>> value = torch.tensor([0.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, 3, 4)
        >>> folded_prompt_attention(query, torch.ones(1, 2, 3, 4), value, scaling=0.5)[0, 0, :, 0]
        tensor([0.0000, 0.5000])
    """
    batch, heads, query_len, head_dim = query.shape
    # All rows have the same keys, so they are queries of one row, (1, heads, batch * query_len,
    # head_dim): no copies of the keys, and a third less time for 8 rows at decoding.
    rows = query.transpose(0, 1).reshape(1, heads, batch * query_len, head_dim)
    term = _attention(rows, key, gated_value, None, scaling=scaling, may_fuse=may_fuse)
    # (batch, query_len, heads, value_dim): the interface's layout.
    return term.reshape(heads, batch, query_len, -1).permute(1, 2, 0, 3)


def row_prompt_attention(
    query: Float[Tensor, "batch heads query_len head_dim"],
    key: Float[Tensor, "batch heads prompt_len head_dim"],
    gated_value: Float[Tensor, "batch heads prompt_len value_dim"],
    bias: Float[Tensor, "batch 1 1 prompt_len"] | None,
    *,
    scaling: float,
    may_fuse: bool = True,
) -> Float[Tensor, "batch query_len heads value_dim"]:
    """Attend to an adaption prompt of its own for each row of a batch, gates folded in already.

    As `folded_prompt_attention` for each row alone, up to rounding.

    Args:
        query: As there.
        key: Keys of each row's prompt, one set for each query head; zeros beyond its length.
        gated_value: Values of each row's prompt, times the gate of the head; zeros beyond its
            length, and for a row that has no prompt.
        bias: Added to the logits: zero at the positions of the row's prompt, of which there is at
            least one, and minus infinity beyond them; None if all prompts have the same length.
        scaling: As there.
        may_fuse: As there.

    Returns:
        As there. Exactly zero for rows whose gated values are zero, if the keys are finite.

    Numerics:
        As there.

    Source:
        See `gated_prompt_attention`.

    Example:
        >>> query = torch.ones(2, 1, 1, 4)
        >>> value = torch.tensor([0.5, 0.0]).view(2, 1, 1, 1).expand(2, 1, 3, 4)
        >>> row_prompt_attention(query, torch.ones(2, 1, 3, 4), value, None, scaling=0.5)[
        ...     :, 0, 0, 0
        ... ]
        tensor([0.5000, 0.0000])
    """
    term = _attention(query, key, gated_value, bias, scaling=scaling, may_fuse=may_fuse)
    # (batch, query_len, heads, value_dim): the interface's layout.
    return term.transpose(1, 2)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    may_fuse: bool,
) -> Tensor:
    """Return `softmax(query @ key.T * scaling + bias) @ value`, in the query's dtype."""
    with _without_autocast(query.device.type):
        # To the keys' dtype and back: they may be wider than the query.
        rows = query.to(key.dtype)
        if may_fuse:
            term = scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scaling)
            return term.to(query.dtype)
        # To float32 or wider before scaling and softmax; low precision would lose the small
        # differences.
        wide = torch.promote_types(key.dtype, torch.float32)
        logits = (rows @ key.transpose(-1, -2)).to(wide) * scaling
        if bias is not None:
            logits = logits + bias
        # Back from `wide` for the second matmul, and to the query's dtype after it.
        return (torch.softmax(logits, dim=-1).to(key.dtype) @ value).to(query.dtype)


def conditioned_prompt(
    prompt: Float[Tensor, "1 prompt_len hidden"],
    features: Float[Tensor, "rows condition_size"],
    down: Float[Tensor, "condition_rank condition_size"],
    up: Float[Tensor, "hidden condition_rank"],
) -> Float[Tensor, "rows prompt_len hidden"]:
    """Add a projection of each row's features to every token of a prompt.

    `prompt + repeat(up @ (down @ features))`: linear and without bias, so that features of zero
    leave the prompt as it is.

    Args:
        prompt: The adaption prompt.
        features: Of each row, for example global features of an image; any device and dtype.
        down: First factor of the projection.
        up: Second factor.

    Returns:
        A prompt for each row, in the prompt's dtype, at least float32.

    Numerics:
        In the returned dtype. Autocast does not change it.

    Source:
        Zhang et al. 2023, arXiv:2303.16199, multi-modal reasoning: P_l^v = P_l + Repeat(I_p).
        Theirs is one projection network for all layers; see docs/how-to/conditioned-prompts.md.

    Example:
        >>> prompt, down, up = torch.ones(1, 2, 4), torch.ones(1, 3), torch.ones(4, 1)
        >>> conditioned_prompt(prompt, torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), down, up)[
        ...     :, :, 0
        ... ]
        tensor([[1., 1.],
                [7., 7.]])
    """
    wide = torch.promote_types(prompt.dtype, torch.float32)
    with _without_autocast(prompt.device.type):
        # From whatever the features come in; the parameters may be narrower than what is computed in.
        given = features.to(prompt.device, wide)
        shift = linear(linear(given, down.to(wide)), up.to(wide))
        # (rows, hidden) -> (rows, 1, hidden), seen at every token.
        return prompt.to(wide) + shift[:, None]


def gated_row_prompt_attention(
    query: Float[Tensor, "batch heads query_len head_dim"],
    prompt_key: Float[Tensor, "rows kv_heads prompt_len head_dim"],
    prompt_value: Float[Tensor, "rows kv_heads prompt_len value_dim"],
    gate: Float[Tensor, " gates"],
    *,
    scaling: float,
    may_fuse: bool = True,
) -> Float[Tensor, "batch query_len heads value_dim"]:
    """Attend to an adaption prompt of its own for each row, and weight the result by the gate.

    As `gated_prompt_attention` for each row alone, up to rounding.

    Args:
        query: As there. A batch of n times `rows` gives each prompt to n rows in succession.
        prompt_key: Keys of each row's prompt.
        prompt_value: Values of each row's prompt.
        gate: As there.
        scaling: As there.
        may_fuse: As there.

    Returns:
        As there.

    Numerics:
        In float32 or wider. Autocast does not change it.

    Source:
        See `gated_prompt_attention`.

    Example:
        >>> query, prompt = torch.ones(2, 2, 1, 4), torch.ones(2, 1, 3, 4)
        >>> gate = torch.tensor([0.0, 0.5])
        >>> gated_row_prompt_attention(query, prompt, prompt, gate, scaling=0.5)[:, 0, :, 0]
        tensor([[0.0000, 0.5000],
                [0.0000, 0.5000]])
    """
    batch, heads = query.shape[:2]
    rows, kv_heads = prompt_key.shape[:2]
    wide = torch.promote_types(query.dtype, torch.float32)
    # To (batch, heads, prompt_len, head_dim) in `wide`: a set of keys for each row and query head.
    key, value = (
        found.to(wide)
        .repeat_interleave(heads // kv_heads, dim=1)
        .repeat_interleave(batch // rows, dim=0)
        for found in (prompt_key, prompt_value)
    )
    gated = value * gate.to(wide).view(-1, 1, 1)
    return row_prompt_attention(query, key, gated, None, scaling=scaling, may_fuse=may_fuse)


def fold_gate(
    key: Float[Tensor, "kv_heads prompt_len head_dim"],
    value: Float[Tensor, "kv_heads prompt_len value_dim"],
    gate: Float[Tensor, " gates"],
    *,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """Repeat keys and values for each query head, and multiply the values by its gate.

    Args:
        key: Keys of the prompt.
        value: Values of the prompt.
        gate: After its activation, dimensionless; one for each query head, or a single one.
        heads: How many query heads there are.

    Returns:
        Keys `(1, heads, prompt_len, head_dim)` and gated values `(1, heads, prompt_len,
        value_dim)`, for `folded_prompt_attention`; in float32 or wider, but in bfloat16 for
        bfloat16 where no gradients are recorded.

    Example:
        >>> key, gated = fold_gate(
        ...     torch.ones(1, 3, 4), torch.ones(1, 3, 4), torch.tensor([0.0, 0.5]), heads=2
        ... )
        >>> gated[0, :, 0, 0]
        tensor([0.0000, 0.5000])
    """
    groups, dtype = heads // key.shape[0], key.dtype
    wide = torch.promote_types(dtype, torch.float32)
    # In `wide` before they are repeated, so that gradients of heads that share a key add up there.
    key, value = key.to(wide), value.to(wide)
    if groups > 1:
        # (kv_heads, prompt_len, head_dim) -> (heads, prompt_len, head_dim)
        key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    gated = value * gate.to(wide).view(-1, 1, 1)
    # Nothing is trained, and bfloat16 can hold whatever float32 can: cast once for speed.
    if dtype is torch.bfloat16 and not torch.is_grad_enabled():
        key, gated = key.to(dtype), gated.to(dtype)
    return key[None], gated[None]


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Keep autocast from undoing the choice of dtypes, where it is on."""
    # Asked first, since entering a context takes as long as a matmul; the meta device has none.
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def activate_gate(gate: Float[Tensor, " gates"], activation: GateActivation) -> Tensor:
    """Apply the gate activation; both leave zero at zero, with slope one.

    Args:
        gate: As learned, dimensionless.
        activation: `"identity"` (the paper, PEFT) or `"tanh"` (LLaMA-Adapter's training code).

    Returns:
        The gate to use, same shape and dtype.

    Example:
        >>> activate_gate(torch.zeros(1), "tanh")
        tensor([0.])
    """
    return torch.tanh(gate) if activation == "tanh" else gate
