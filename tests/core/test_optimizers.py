"""Parameters come to an optimizer as a group and leave without a trace."""

import gc
from copy import deepcopy

import pytest
import torch
from core.edits import edited
from core.toys import Net, example
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

from surgery_core import OptionsError
from surgery_core.optimizers import OptimizerGroup

KINDS = {
    "sgd": (SGD, {"momentum": 0.9}),
    "plain sgd": (SGD, {}),
    "adamw": (AdamW, {"amsgrad": True}),
    "fused adamw": (AdamW, {"fused": True}),
    "adagrad": (Adagrad, {"initial_accumulator_value": 0.1}),
}


def parameters(num=2):
    return [nn.Parameter(torch.linspace(0, 1, 3) + i) for i in range(num)]


def step(optimizer, *groups):
    """Do a step with the gradients of a sum of squares."""
    sum(p.square().sum() for group in groups for p in group).backward()
    optimizer.step()
    optimizer.zero_grad()


def plain(value):
    """Return a state dict as data that can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("is_stepped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_trained_and_leaves_the_state_as_it_was(kind, is_stepped):
    """What the optimizer kept for its own parameters stays; it trains them as if nothing had been."""
    cls, options = KINDS[kind]
    base, added, twin = parameters(), parameters(), parameters()
    optimizer, alone = cls(base, lr=0.1, **options), cls(twin, lr=0.1, **options)
    for each, own in ((optimizer, base), (alone, twin)):
        step(each, own)
    before = plain(deepcopy(optimizer.state_dict()))

    group = OptimizerGroup.add(optimizer, added, {"lr": 0.5})
    if is_stepped:
        step(optimizer, added)
    trained = [p.tolist() for p in added]
    group.remove()
    group.remove()

    assert is_stepped is (trained != [p.tolist() for p in parameters()])
    assert before == plain(optimizer.state_dict())
    assert not any(p in optimizer.state for p in added)
    for each, own in ((optimizer, base), (alone, twin)):
        step(each, own)
    assert [p.tolist() for p in twin] == [p.tolist() for p in base]


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_trained_as_if_it_had_been_there_from_the_start(kind):
    cls, options = KINDS[kind]
    base, added, twin = parameters(), parameters(3), parameters(3)
    optimizer, alone = cls(base, lr=0.1, **options), cls(twin, lr=0.3, **options)

    OptimizerGroup.add(optimizer, added, {"lr": 0.3})
    for _ in range(3):
        step(optimizer, added)
        step(alone, twin)

    assert [p.tolist() for p in twin] == [p.tolist() for p in added]


def test_options_that_are_left_out_are_the_optimizers():
    optimizer = AdamW(parameters(), lr=0.1, weight_decay=0.2)

    OptimizerGroup.add(optimizer, parameters(), {"lr": 0.5, "betas": (0.5, 0.6)})

    own, added = optimizer.param_groups
    assert (0.1, 0.2, (0.9, 0.999)) == (own["lr"], own["weight_decay"], own["betas"])
    assert (0.5, 0.2, (0.5, 0.6)) == (added["lr"], added["weight_decay"], added["betas"])


def test_several_groups_leave_in_any_order():
    optimizer = SGD(parameters(), lr=0.1)
    first, second = (OptimizerGroup.add(optimizer, parameters(), {"lr": lr}) for lr in (0.2, 0.3))

    first.remove()
    assert [0.1, 0.3] == [group["lr"] for group in optimizer.param_groups]
    second.remove()
    assert [0.1] == [group["lr"] for group in optimizer.param_groups]


def test_a_group_leaves_after_a_state_was_loaded():
    """Loading makes other dictionaries of the groups."""
    optimizer = AdamW(parameters(), lr=0.1)
    group = OptimizerGroup.add(optimizer, parameters(), {"lr": 0.5})
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))

    group.remove()

    assert [0.1] == [group["lr"] for group in optimizer.param_groups]


def test_an_empty_group_of_somebody_else_stays():
    optimizer = SGD(parameters(), lr=0.1)
    optimizer.add_param_group({"params": [], "lr": 0.7})

    OptimizerGroup.add(optimizer, parameters(), {}).remove()

    assert [0.1, 0.7] == [group["lr"] for group in optimizer.param_groups]


# -- refused --------------------------------------------------------------------------------------


def refusal(optimizer, added, options=None):
    """Return why a group is refused; the optimizer is as it was."""
    before = plain(deepcopy(optimizer.state_dict()))
    with pytest.raises(OptionsError) as caught:
        OptimizerGroup.add(optimizer, added, options or {})
    assert before == plain(optimizer.state_dict())
    return str(caught.value)


def test_no_parameters_are_refused():
    expected = "Optimizer gets no group: expected parameters to train, got none."

    assert expected == refusal(SGD(parameters(), lr=0.1), [])


def test_parameters_that_the_optimizer_has_are_refused():
    base = parameters()
    optimizer = SGD(base, lr=0.1)
    added = parameters()
    OptimizerGroup.add(optimizer, added, {})

    assert (
        "Optimizer has 1 of the 3 parameters already: expected others. Add them once."
    ) == refusal(optimizer, [*parameters(), base[0]])
    assert (
        "Optimizer has 2 of the 2 parameters already: expected others. Add them once."
    ) == refusal(optimizer, added)


def test_a_parameter_given_twice_is_refused():
    (one, two) = parameters()

    assert (
        "Optimizer gets 3 parameters, some of them twice: expected each once. Leave out the others."
    ) == refusal(SGD(parameters(), lr=0.1), [one, two, one])


def test_options_that_the_optimizer_would_not_read_are_refused():
    optimizer = SGD(parameters(), lr=0.1)

    assert (
        "Optimizer SGD has no options 'learning_rate', 'weight_decy': expected some of "
        "'dampening', 'differentiable', 'foreach', 'fused', 'lr', 'maximize', 'momentum', "
        "'nesterov', 'weight_decay'. Leave them out."
    ) == refusal(optimizer, parameters(), {"learning_rate": 1.0, "weight_decy": 0.1})
    assert refusal(optimizer, parameters(), {"momentun": 1.0}).endswith("Did you mean 'momentum'?")


def test_an_option_of_somebody_elses_groups_is_known():
    optimizer = SGD([{"params": parameters(), "is_muon": True}], lr=0.1)

    OptimizerGroup.add(optimizer, parameters(), {"is_muon": False})

    assert [True, False] == [group["is_muon"] for group in optimizer.param_groups]


def test_an_optimizer_with_a_single_group_is_refused():
    assert (
        "Optimizer LBFGS has a single group: expected one that trains every group. Make it with "
        "the parameters, or use another."
    ) == refusal(LBFGS(parameters()), parameters())


def test_what_torch_refuses_is_refused():
    """Here an optimizer that knows its parameters by name."""
    named = [(str(i), p) for i, p in enumerate(parameters())]

    message = refusal(SGD(named, lr=0.1), parameters())

    assert message.startswith("Optimizer SGD refuses the group: all optimizer param groups should")


SCHEDULERS = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 10),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.5**epoch),
}


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_an_optimizer_that_had_a_scheduler_is_refused(kind, is_kept):
    """Torch gives no way to tell whether there still is one."""
    optimizer = SGD(parameters(), lr=0.1)
    scheduler = SCHEDULERS[kind](optimizer)
    if not is_kept:
        del scheduler
        gc.collect()

    assert (
        "Optimizer has, or had, a learning-rate scheduler, which knows the groups there were: "
        "expected none yet. Make another optimizer, and its scheduler after adding the parameters."
    ) == refusal(optimizer, parameters())


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_made_afterwards_sets_the_rate_of_the_group(kind):
    optimizer = SGD(parameters(), lr=0.1)
    added = parameters()
    OptimizerGroup.add(optimizer, added, {"lr": 0.5})
    scheduler = SCHEDULERS[kind](optimizer)

    step(optimizer, added)
    scheduler.step()

    own, other = optimizer.param_groups
    assert 0.5 > other["lr"]
    assert other["lr"] == pytest.approx(5 * own["lr"])


def test_a_scheduler_that_takes_any_groups_is_no_obstacle():
    optimizer = SGD(parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    group = OptimizerGroup.add(optimizer, parameters(), {"lr": 0.4})

    for loss in (1.0, 2.0):
        scheduler.step(loss)
    rates = [group["lr"] for group in optimizer.param_groups]
    group.remove()
    scheduler.step(3.0)

    assert [0.05, 0.2] == rates
    assert [0.025] == [group["lr"] for group in optimizer.param_groups]


# -- with a recipe --------------------------------------------------------------------------------


def test_a_recipe_gives_its_parameters_to_an_optimizer_until_the_revert():
    """Trained, the adapter alone has changed; afterwards the optimizer has what it had."""
    model = Net().eval()
    optimizer = AdamW(model.parameters(), lr=0.1)
    before = plain(deepcopy(optimizer.state_dict()))
    base = {key: value.clone() for key, value in model.state_dict().items()}
    found = edited(model)
    added = found.added_parameters(["wide"])

    found.add_to_optimizer(optimizer, ["wide"], lr=0.5, weight_decay=0.0)
    with pytest.raises(OptionsError, match=r"^Optimizer has 3 of the 3 parameters already"):
        found.add_to_optimizer(optimizer, ["wide"])
    found.model(example()).square().sum().backward()
    optimizer.step()

    assert 3 == len(added)
    assert all(parameter.any() for parameter in added)
    found.revert()
    assert before == plain(optimizer.state_dict())
    assert all(torch.equal(base[key], value) for key, value in model.state_dict().items())
