"""The term itself: against the formula in float64, its gradients, and its exact zero."""

import importlib
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, install_import_hook
from support.reference import reference_term
from surgery_adaption_prompt.functional import (
    activate_gate,
    gated_prompt_attention,
    gated_row_prompt_attention,
)

FLOAT64 = 1e-12


def case(kv_heads=2, groups=3, head_dim=4, length=5, prompt_len=3, dtype=torch.float64, seed=0):
    """Return query, prompt, gates that differ per head, and projections."""
    torch.manual_seed(seed)
    heads, hidden = kv_heads * groups, 7
    query = torch.randn(2, heads, length, head_dim, dtype=dtype)
    prompt = torch.randn(prompt_len, hidden, dtype=dtype)
    gates = torch.linspace(-1.5, 2, heads, dtype=dtype)
    weights = [torch.randn(kv_heads * head_dim, hidden, dtype=dtype) for _ in range(2)]
    biases = [torch.randn(kv_heads * head_dim, dtype=dtype) for _ in range(2)]
    return query, prompt, gates, (weights[0], biases[0], weights[1], biases[1])


def projected(prompt, weights, head_dim):
    key_weight, key_bias, value_weight, value_bias = weights
    key, value = prompt @ key_weight.T + key_bias, prompt @ value_weight.T + value_bias
    return tuple(t.view(len(prompt), -1, head_dim).transpose(0, 1) for t in (key, value))


@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    length=st.integers(1, 4),
    prompt_len=st.integers(1, 4),
    activation=st.sampled_from(["identity", "tanh"]),
    seed=st.integers(0, 9),
)
def test_the_term_is_the_formulas(kv_heads, groups, length, prompt_len, activation, seed):
    query, prompt, gates, weights = case(kv_heads, groups, 4, length, prompt_len, seed=seed)
    expected = reference_term(query, prompt, gates, weights, scaling=0.3, activation=activation)

    key, value = projected(prompt, weights, 4)
    gate = activate_gate(gates, activation)
    actual = gated_prompt_attention(query, key, value, gate, scaling=0.3)

    assert expected.shape == actual.shape
    assert (actual - expected).abs().max() < FLOAT64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gate_of_zero_gives_exact_zeros(dtype):
    query, prompt, gates, weights = case(dtype=dtype)
    key, value = projected(prompt, weights, 4)
    gates[2] = 0

    term = gated_prompt_attention(query, key, value, gates, scaling=0.5)

    assert term.dtype is dtype
    assert (term[:, :, 2] == 0).all()
    assert (term[:, :, 1] != 0).any()


def test_one_gate_serves_all_heads():
    query, prompt, _, weights = case()
    key, value = projected(prompt, weights, 4)

    one = gated_prompt_attention(query, key, value, torch.tensor([0.7]).double(), scaling=0.5)
    six = gated_prompt_attention(query, key, value, torch.full((6,), 0.7).double(), scaling=0.5)

    assert torch.equal(one, six)


def test_float16_logits_beyond_float16_do_not_give_nan():
    """Logits of 90,000 exceed the largest float16, 65,504; the weights are still a softmax."""
    query = torch.full((1, 1, 1, 4), 150.0, dtype=torch.float16)
    key = torch.full((1, 2, 4), 150.0, dtype=torch.float16)
    value = torch.tensor([[[1.0], [3.0]]], dtype=torch.float16)

    term = gated_prompt_attention(query, key, value, torch.ones(1), scaling=1.0)

    assert torch.tensor([[[[2.0]]]], dtype=torch.float16).equal(term)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_gradients_are_those_of_finite_differences(activation):
    query, prompt, gates, weights = case(length=2)
    key, value = projected(prompt, weights, 4)
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value, gates)]

    def term(query, key, value, gate):
        return gated_prompt_attention(
            query, key, value, activate_gate(gate, activation), scaling=0.3
        )

    assert torch.autograd.gradcheck(term, inputs)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_activations_keep_zero_with_slope_one(activation):
    gate = torch.zeros(3, requires_grad=True)

    activate_gate(gate, activation).sum().backward()

    assert torch.equal(torch.zeros(3), activate_gate(gate, activation))
    assert torch.equal(torch.ones(3), gate.grad)


def test_shapes_in_the_signature_are_true():
    """With jaxtyping's hook the annotations are checked, and a wrong shape is refused."""
    name = "surgery_adaption_prompt.functional"
    original = sys.modules.pop(name)
    try:
        with install_import_hook(name, "beartype.beartype"):
            checked = importlib.import_module(name)
        query, prompt, gates, weights = case()
        key, value = projected(prompt, weights, 4)

        term = checked.gated_prompt_attention(query, key, value, gates, scaling=0.5)

        assert torch.equal(gated_prompt_attention(query, key, value, gates, scaling=0.5), term)
        with pytest.raises(TypeCheckError):
            checked.gated_prompt_attention(query, key[:, :2], value, gates, scaling=0.5)
    finally:
        sys.modules[name] = original


def test_float16_rows_of_conditioned_adapters_hold_values_that_float16_cannot():
    """Values near the largest float16 times a gate of two, which cancel again in the sum."""
    torch.manual_seed(0)
    rows, kv_heads, length, prompt_len, head_dim = 2, 2, 3, 4, 4
    gates = torch.tensor([2.0, -1.5, 0.5, 3.0])
    query = torch.randn(rows, 4, length, head_dim).half()
    key = torch.randn(rows, kv_heads, prompt_len, head_dim).half()
    value = 60000 * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1).expand(4, head_dim)
    value = (value + torch.randn(rows, kv_heads, prompt_len, head_dim) * 100).half()
    # Equal logits, so that the shares are all a quarter and the large values cancel.
    key[:] = key[:, :, :1]
    expected = torch.stack(
        [
            gates[head].double() * value[:, head // 2].double().mean(dim=1)
            for head in range(len(gates))
        ],
        dim=1,
    )[:, None].expand(-1, length, -1, -1)

    actual = gated_row_prompt_attention(query, key, value, gates, scaling=0.5)

    assert torch.float16 is actual.dtype
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).abs().max() <= 2e-3 * expected.abs().max()
