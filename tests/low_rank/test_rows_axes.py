"""Rows at layers whose input does not begin with the batch: right, or refused."""

import copy

import pytest
import torch
from surgery_low_rank import plugin
from torch import nn

from surgery_core import ModelRecipe, OptionsError, Session
from surgery_core.testing import assert_unchanged, snapshot

ROWS = ["a", "b"]
SIZE = 4


class Plain(nn.Module):
    """Two layers, the first over the input as it is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class SequenceFirst(Plain):
    """As XLNet: the second layer gets (sequence, batch, features)."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).transpose(0, 1)).transpose(0, 1)


class Windows(Plain):
    """The second layer gets windows of two tokens, those of all rows in turn."""

    def forward(self, x):
        parts = torch.cat(torch.tanh(self.first(x)).split(2, dim=1))
        return torch.cat(self.second(parts).split(len(x)), dim=1)


class Twice(Plain):
    """The second layer gets all rows, and all rows again."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).repeat(2, 1, 1))[len(x) :]


class Tokens(Plain):
    """As a mixture of experts: the second layer gets tokens of all rows."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).flatten(0, 1)).view_as(x)


class Crossed(Plain):
    """An encoder, and a decoder that attends to what it gave."""

    def __init__(self):
        super().__init__()
        self.encoder = Plain()

    def forward(self, x, encoded=None):
        keys = self.second(self.encoder(x) if encoded is None else encoded)
        return self.first(x) + keys.mean(1, keepdim=True)


class Kept(Plain):
    """Has a norm with statistics, and may be given a cache."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(SIZE)

    def forward(self, x, cache=None):
        del cache
        return self.norm(super().forward(x).mT).mT


def edit(model):
    one = {"operation": "low_rank", "options": {"r": 2}}
    recipe = ModelRecipe.model_validate({"adapters": {"a": one, "b": one}, "active": "a"})
    edited = Session([plugin], discover=False).plan_recipe(model, recipe).apply()
    generator = torch.Generator().manual_seed(0)
    for name in ROWS:
        for tensor in edited.tensors(name).values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return edited


def batch(rows, length):
    return torch.randn(rows, length, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def alone(edited, call):
    """Return what each adapter gives when it is the active one, by a row's place."""
    found = []
    for name in ROWS:
        edited.set_active(name)
        found.append(call())
    edited.set_active("a")
    return torch.stack([each for n, one in enumerate(found) for each in one.chunk(2)[n]])


LENGTHS = [(2, 6), (4, 6), (6, 2), (2, 2), (2, 4), (4, 2), (4, 4), (2, 1), (6, 6)]


@pytest.mark.parametrize(("rows", "length"), LENGTHS)
@pytest.mark.parametrize("cls", [Plain, Crossed])
def test_rows_are_right_where_the_batch_comes_first(cls, rows, length):
    """Also where the sequence is as long as the batch, and for several rows of each adapter."""
    torch.manual_seed(0)
    edited = edit(cls().eval())
    x = batch(rows, length)
    expected = alone(edited, lambda: edited.model(x))

    with torch.no_grad(), edited.activated(ROWS):
        actual = edited.model(x)

    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "length"), LENGTHS)
@pytest.mark.parametrize("cls", [SequenceFirst, Windows, Twice, Tokens])
def test_rows_are_right_or_refused_elsewhere(cls, rows, length):
    torch.manual_seed(0)
    edited = edit(cls().eval())
    x = batch(rows, length)
    expected = alone(edited, lambda: edited.model(x))
    before = snapshot(edited.model)

    with torch.no_grad(), edited.activated(ROWS):
        try:
            actual = edited.model(x)
        except OptionsError as err:
            assert "got a batch of" in str(err) or "for rows with" in str(err)  # noqa: PT017 (either is right)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    assert_unchanged(before, edited.model, subject="Rows")
    with torch.no_grad(), edited.activated("b"):
        torch.testing.assert_close(edited.model(x)[-1], expected[-1], rtol=1e-5, atol=1e-5)


def test_the_error_says_where_and_what():
    edited = edit(SequenceFirst())
    with edited.activated(ROWS), pytest.raises(OptionsError) as caught:
        edited.model(batch(2, 6))
    assert str(caught.value) == (
        "Linear layer 'second' got an input of shape (6, 2, 4) for rows with adapters that differ: "
        "expected (batch, ..., in_features), but the model's own input has 2 rows. Give the whole "
        "batch one adapter, or make the batch another length than the sequence."
    )


def test_a_pass_may_begin_inside_the_model():
    """As generation runs an encoder by itself, before the decoder."""
    torch.manual_seed(0)
    edited = edit(Crossed().eval())
    model, x = edited.model, batch(2, 6)
    expected = alone(edited, lambda: model(x, encoded=model.encoder(x)))

    with torch.no_grad(), edited.activated(ROWS):
        actual = model(x, encoded=model.encoder(x))

    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_was_seen_once_is_known():
    """A cache cannot be probed with; another length tells the axis for good."""
    edited = edit(Kept().eval())
    x, cache = batch(2, 2), object()
    expected = alone(edited, lambda: edited.model(x))
    with torch.no_grad():
        with edited.activated(ROWS), pytest.raises(OptionsError, match="another is as long"):
            edited.model(x, cache=cache)
        with edited.activated(ROWS):
            edited.model(batch(2, 3), cache=cache)
            actual = edited.model(x, cache=cache)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_probing_leaves_statistics_and_random_numbers_as_they_were():
    torch.manual_seed(0)
    edited = edit(Kept().train())
    plain = copy.deepcopy(edited.plan.model)
    x = batch(2, 2)
    with torch.no_grad():
        torch.manual_seed(3)
        expected, drawn = plain(x), torch.rand(1)
        torch.manual_seed(3)
        with edited.activated(ROWS):
            edited.model(x)
        assert drawn == torch.rand(1)
    del expected
    assert int(edited.model.norm.num_batches_tracked) == int(plain.norm.num_batches_tracked) == 1


def test_two_rows_blocks_of_threads_share_the_hooks():
    edited = edit(Plain().eval())
    x = batch(2, 6)
    expected = alone(edited, lambda: edited.model(x))
    with torch.no_grad(), edited.activated(ROWS):
        with edited.activated(ROWS[::-1]):
            edited.model(x)
        torch.testing.assert_close(edited.model(x), expected, rtol=1e-5, atol=1e-5)
    assert not edited.model._forward_pre_hooks
    assert not edited.model._forward_hooks
