"""What property tests of adapters draw: shapes, padded batches, and ways to run a model."""

import torch
from hypothesis import strategies as st

from support.caches import cache_of, with_cache
from support.families import Shape, tokens


@st.composite
def shapes(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([4, 8]))
    # Half of the time heads * head_dim is not the hidden size.
    return Shape(
        hidden=kv_heads * groups * draw(st.sampled_from([head_dim, 6])),
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=draw(st.integers(1, 3)),
        attention_bias=draw(st.booleans()),
    )


@st.composite
def batches(draw):
    """Token ids and an attention mask, padded left, right or not at all."""
    length = draw(st.integers(2, 9))
    ids = tokens(2, length, seed=draw(st.integers(0, 99)))
    mask = torch.ones_like(ids)
    side = draw(st.sampled_from(["none", "left", "right"]))
    pad = draw(st.integers(1, length - 1))
    if side == "left":
        mask[1, :pad] = 0
    elif side == "right":
        mask[1, -pad:] = 0
    return ids * mask, mask


def logits_in_one(model, ids, mask):
    return model(ids, attention_mask=mask, use_cache=False).logits


def logits_stepwise(model, ids, mask):
    """Prefill the first half with a cache, then decode token by token."""
    half = ids.shape[1] // 2
    out = model(ids[:, :half], attention_mask=mask[:, :half], use_cache=True)
    parts = [out.logits]
    for at in range(half, ids.shape[1]):
        out = model(
            ids[:, at : at + 1],
            attention_mask=mask[:, : at + 1],
            **with_cache(cache_of(out)),
            use_cache=True,
        )
        parts.append(out.logits)
    return torch.cat(parts, dim=1)
