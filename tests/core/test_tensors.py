"""Tensors are copied into others all or none, whatever stops it, also those made in inference mode."""

import pytest
import torch
from core.edits import recipe
from core.toys import Net, session
from torch import Tensor

from surgery_core import StateError, load_tensors_
from surgery_core.testing import snapshot


def load(own, state):
    load_tensors_(own, state, subject="No fit", fix="Stop.")


def test_tensors_made_in_inference_mode_are_loaded_outside_it():
    with torch.inference_mode():
        own = {"a": torch.zeros(2), "b": torch.zeros(2)}

    load(own, {"a": torch.ones(2), "b": torch.full((2,), 2.0)})

    assert [[1, 1], [2, 2]] == [own[name].tolist() for name in "ab"]


class Unwritable(Tensor):
    """Fails when it is written to, the first time."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.copy_ and not getattr(args[0], "has_failed", False):
            args[0].has_failed = True
            raise args[0].error
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_copy_that_fails_takes_back_those_before_it(error, place):
    own = {name: torch.zeros(2) for name in "abc"}
    failing = own["abc"[place]] = torch.zeros(2).as_subclass(Unwritable)
    failing.error = error

    with pytest.raises(type(error)):
        load(own, {name: torch.ones(2) for name in "abc"})

    assert all(not tensor.any() for tensor in own.values())


@pytest.mark.parametrize(
    ("own", "given", "problem"),
    [
        (torch.zeros(1, dtype=torch.int8), torch.tensor([300]), "values do not fit in torch.int8"),
        (
            torch.zeros(1, dtype=torch.float16),
            torch.tensor([1e6]),
            "values are not finite in torch",
        ),
    ],
)
def test_values_that_the_dtype_cannot_hold_are_refused(own, given, problem):
    with pytest.raises(StateError, match=f"mismatched 'w: {problem}"):
        load({"w": own}, {"w": given})

    assert not own.any()


def test_what_is_applied_in_inference_mode_is_ordinary():
    """It can be trained, moved and loaded outside; a model made in that mode can be edited too."""
    with torch.inference_mode():
        edited = session().plan_recipe(Net(), recipe()).apply()
        made_inside = Net()
    tensors = [t for name in recipe().adapters for t in edited.tensors(name).values()]
    assert tensors
    assert not any(tensor.is_inference() for tensor in tensors)

    before = snapshot(made_inside, values=False)
    session().plan_recipe(made_inside, recipe()).apply().revert()

    assert before == snapshot(made_inside, values=False)
