"""The method once more, slowly and from the formula, in float64."""

import inspect
from contextlib import contextmanager

import torch


def reference_term(query, prompt, gates, weights, *, scaling, activation):
    """Return `act(g_h) * softmax(q_h K^T scaling) V`, one head and one position at a time.

    Args:
        query: `(batch, heads, query_len, head_dim)`.
        prompt: `(prompt_len, hidden)`.
        gates: One for each head.
        weights: `(Wk, bk, Wv, bv)` of the base; biases may be None.
        scaling: Factor on the logits.
        activation: `"identity"` or `"tanh"`.

    Returns:
        `(batch, query_len, heads, head_dim)`.
    """
    batch, heads, length, head_dim = query.shape
    key_weight, key_bias, value_weight, value_bias = weights
    keys = prompt @ key_weight.T + (0 if key_bias is None else key_bias)
    values = prompt @ value_weight.T + (0 if value_bias is None else value_bias)
    groups = heads // (keys.shape[-1] // head_dim)
    out = torch.zeros(batch, length, heads, head_dim, dtype=query.dtype)
    for head in range(heads):
        at = slice((head // groups) * head_dim, (head // groups + 1) * head_dim)
        gate = torch.tanh(gates[head]) if activation == "tanh" else gates[head]
        for row in range(batch):
            for position in range(length):
                logits = keys[:, at] @ query[row, head, position] * scaling
                shares = torch.exp(logits - logits.max())
                shares = shares / shares.sum()
                out[row, position, head] = gate * (shares @ values[:, at])
    return out


def kv_weights(attention):
    """Return `(Wk, bk, Wv, bv)` of an attention module, fused or not."""
    children = dict(attention.named_children())
    if "qkv_proj" in children:
        config = attention.config
        sizes = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
        _, key, value = children["qkv_proj"].weight.split([n * attention.head_dim for n in sizes])
        return key, None, value, None
    if "c_attn" in children:
        # A Conv1D: its weight is the transpose of a linear layer's.
        fused = children["c_attn"]
        (_, key, value), (_, key_bias, value_bias) = fused.weight.T.chunk(3), fused.bias.chunk(3)
        return key, key_bias, value, value_bias
    if "query_key_value" in children:
        fused = children["query_key_value"]
        heads, width = attention.config.num_attention_heads, fused.weight.shape[0] // 3
        weight = fused.weight.view(heads, 3, width // heads, -1)
        bias = fused.bias.view(heads, 3, width // heads)
        rows = [weight[:, i].reshape(width, -1) for i in (1, 2)]
        offsets = [bias[:, i].reshape(width) for i in (1, 2)]
        return rows[0], offsets[0], rows[1], offsets[1]
    names = ("k_proj", "v_proj") if "k_proj" in children else ("key", "value")
    # Moshi keeps its linear layers one level further down.
    key, value = (getattr(children[name], "linear", children[name]) for name in names)
    return key.weight, key.bias, value.weight, value.bias


@contextmanager
def reference_model(model, adapters, *, scaling, activation="identity"):
    """Run an unadapted sdpa model with the reference term added inside its attention function.

    Args:
        model: A model with sdpa attention, not adapted.
        adapters: `(prompt, gates)` by attention module.
        scaling: Factor on the logits.
        activation: Of the gates.
    """
    act = torch.tanh if activation == "tanh" else lambda gates: gates
    terms = {module: [(prompt, act(gates))] for module, (prompt, gates) in adapters.items()}
    with reference_sum(model, terms, scaling=scaling):
        yield model


@contextmanager
def reference_sum(model, terms, *, scaling):
    """Run an unadapted sdpa model with several reference terms added inside its attention function.

    Args:
        model: A model with sdpa attention, not adapted.
        terms: `(prompt, gates)` of each term by attention module; gates after their activation.
        scaling: Factor on the logits.
    """
    attention = next(module for module in model.modules() if hasattr(module, "layer_idx"))
    table = inspect.unwrap(type(attention).forward).__globals__["ALL_ATTENTION_FUNCTIONS"]
    attend = table["sdpa"]

    def with_terms(module, query, *args, **kwargs):
        output, weights = attend(module, query, *args, **kwargs)
        for prompt, gates in terms.get(module, ()):
            output = output + reference_term(
                query, prompt, gates, kv_weights(module), scaling=scaling, activation="identity"
            )
        return output, weights

    table["sdpa"] = with_terms
    try:
        yield model
    finally:
        del table["sdpa"]
