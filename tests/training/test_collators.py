"""Packed examples do not see one another, and the loss is the padded one, token for token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.trainable import ADAPTERS, VOCAB, make_model
from surgery_training.collators import PackingCollator, PaddingCollator, check_packing
from surgery_training.examples import IGNORED, Tokens
from surgery_training.losses import answer_loss, takes_kept
from torch.nn.functional import cross_entropy
from transformers import Mamba2Config, Mamba2ForCausalLM

from surgery_core import ModelRecipe, OptionsError, Session

EXAMPLES = [
    Tokens(input_ids=(5, 6, 7, 8), labels=(-100, -100, 7, 8)),
    Tokens(input_ids=(9, 10), labels=(-100, 10)),
    Tokens(input_ids=(11, 12, 13, 14, 15, 16), labels=(-100, 12, -100, -100, 15, 16)),
]


def adapted(*names, dtype=torch.float32):
    """Return a tiny Llama with adapters whose gates are open, each head's at another value."""
    model = make_model(dtype)
    rules = [{**ADAPTERS[name], "options": {**ADAPTERS[name].get("options", {})}} for name in names]
    recipe = ModelRecipe.model_validate({"adapters": {"own": {"rules": rules}}})
    edited = Session().plan_recipe(model, recipe).apply()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in edited.tensors("own").values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return edited.model


def losses_by_token(model, batch):
    """Return the loss of every label by its token, as in the formula, in the order of the batch."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    found = cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
    )
    return found[(labels != IGNORED).reshape(-1)]


@pytest.mark.parametrize("names", [("prompts",), ("low_rank",), ("prompts", "scales")])
@torch.no_grad()
def test_the_packed_loss_is_the_padded_one_for_every_token(names):
    model = adapted(*names)

    padded = losses_by_token(model, PaddingCollator(pad=0)(EXAMPLES))
    packed = losses_by_token(model, PackingCollator()(EXAMPLES))
    alone = torch.cat([losses_by_token(model, PaddingCollator(pad=0)([e])) for e in EXAMPLES])

    assert len(padded) == 6
    torch.testing.assert_close(packed, padded, rtol=0, atol=2e-6)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-6)
    # Without positions of their own they would see one another.
    joined = PackingCollator()(EXAMPLES)
    joined["position_ids"] = torch.arange(12)[None]
    assert (losses_by_token(model, joined) - padded).abs().max() > 1e-3


@pytest.mark.parametrize("is_selective", [True, False])
@pytest.mark.parametrize("collator", [PaddingCollator(pad=0), PackingCollator()])
@torch.no_grad()
def test_the_loss_is_the_sum_over_labels(collator, is_selective):
    model = adapted("prompts")
    batch = collator(EXAMPLES)

    total, count = answer_loss(model, batch, is_selective=is_selective)

    assert takes_kept(model)
    assert count == 6
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), losses_by_token(model, batch).sum())


@pytest.mark.parametrize("is_selective", [True, False])
@torch.no_grad()
def test_a_batch_without_labels_adds_nothing(is_selective):
    blanks = [Tokens(input_ids=e.input_ids, labels=(IGNORED,) * len(e.labels)) for e in EXAMPLES]

    total, count = answer_loss(
        make_model(), PaddingCollator(pad=0)(blanks), is_selective=is_selective
    )

    assert (float(total), count) == (0.0, 0)


def test_sums_of_a_bfloat16_model_are_float32():
    model = adapted("prompts", dtype=torch.bfloat16)

    total, _ = answer_loss(model, PackingCollator()(EXAMPLES), is_selective=True)
    total.backward()

    assert total.dtype == torch.float32
    grads = {p.dtype for p in model.parameters() if p.grad is not None}
    assert grads == {torch.float32}


@given(st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=9), min_size=1, max_size=5))
def test_nothing_is_lost_or_made_up(rows):
    """Every token and label is in either kind of batch, and the first of an example has no label."""
    examples = [Tokens(input_ids=tuple(row), labels=(IGNORED, *row[1:])) for row in rows]

    padded, packed = PaddingCollator(pad=3)(examples), PackingCollator()(examples)

    mask = padded["attention_mask"].bool()
    for name in ("input_ids", "labels"):
        assert torch.equal(padded[name][mask][None], packed[name])
    assert set(padded["labels"][~mask].tolist()) <= {IGNORED}
    assert set(padded["input_ids"][~mask].tolist()) <= {3}
    starts = packed["position_ids"] == 0
    assert int(starts.sum()) == len(rows)
    assert set(packed["labels"][starts].tolist()) == {IGNORED}


def test_a_model_that_keeps_packed_examples_apart_is_fine():
    model = adapted("prompts").train()

    check_packing(model, EXAMPLES[0], EXAMPLES[2])
    check_packing(model, Tokens(input_ids=(0, 0), labels=(-100, 0)), EXAMPLES[2])

    assert model.training


def test_a_model_that_mixes_packed_examples_is_refused():
    """A state that goes on from token to token knows no positions."""
    config = Mamba2Config(
        vocab_size=len(VOCAB),
        hidden_size=16,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    )
    model = Mamba2ForCausalLM(config).eval()

    with pytest.raises(OptionsError, match="Mamba2ForCausalLM does not keep packed examples apart"):
        check_packing(model, EXAMPLES[0], EXAMPLES[2])
