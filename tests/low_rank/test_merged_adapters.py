"""What is refused while an adapter is merged, since the weights would not follow."""

import pytest
import torch
from low_rank.test_merging import X, edit, net, session
from surgery_low_rank import merge_

from surgery_core import ContractError
from surgery_core.testing import assert_unchanged, snapshot


@pytest.mark.parametrize("active", ["a", {"a": 0.5, "b": -2.0}], ids=["one", "several"])
def test_tensors_are_not_loaded_into_an_adapter_that_is_merged(active):
    """The weights would keep the old ones; after unmerging they are the formula's."""
    edited = edit(active, net().double())
    state = {name: torch.ones_like(tensor) for name, tensor in edited.tensors("a").items()}
    merge = merge_(edited)
    before = snapshot(edited.model)
    with pytest.raises(ContractError) as caught:
        edited.load_("a", state)
    assert str(caught.value) == (
        "Tensors of 'a' cannot be loaded: its terms are merged into the weight of the base at '0'. "
        "Call unmerge() first."
    )
    assert_unchanged(before, edited.model, subject="A refused load")

    merge.unmerge()
    edited.load_("a", state)
    edited.set_active("a")
    layer = edited.variant("a")["0"]
    base = edited.swap_state.sites["0"].module
    # Matrices of ones, rank 1, alpha 8.
    expected = X.double() @ (base.weight + 8 * torch.ones(5, 4)).T + base.bias
    torch.testing.assert_close(layer(X.double()), expected, rtol=1e-6, atol=1e-6)


def test_tensors_of_other_adapters_are_loaded_meanwhile():
    edited = edit("a")
    merge_(edited)
    edited.load_("b", {name: torch.ones_like(t) for name, t in edited.tensors("b").items()})


@pytest.mark.parametrize("way", ["disabled", "paused", "save"])
def test_a_merged_model_does_not_pass_for_its_base(way, tmp_path):
    """The weights have the terms: disabling would give the adapter's answers, and a record them."""
    edited = edit("a")
    with edited.disabled():
        expected = edited.model(X)
    before = edited.model(X)
    with (
        merge_(edited),
        pytest.raises(ContractError, match=r"merged into the weight of the base at '0'\. Call"),
    ):
        session().save(edited, tmp_path) if way == "save" else getattr(edited, way)().__enter__()
    assert not list(tmp_path.iterdir())
    assert torch.equal(before, edited.model(X))
    with edited.disabled():
        assert torch.equal(expected, edited.model(X))
