"""Parameters that come and go with a surgery, as groups of an optimizer."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from surgery_core.errors import OptionsError, listed


class OptimizerGroup:
    """A group that was added to an optimizer, and can be removed with all that is kept for it.

    Args:
        optimizer: That has it.
        parameters: What is in the group.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> None:
        self._optimizer = optimizer
        self._parameters = tuple(parameters)

    @classmethod
    def add(
        cls,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        options: Mapping[str, Any],
    ) -> Self:
        """Add parameters as a group.

        Args:
            optimizer: Has none of them.
            parameters: At least one, none twice.
            options: Of the group, such as `lr`; the optimizer's own where they are left out.

        Raises:
            OptionsError: There are no parameters, the optimizer has some of them, does not know an
                option or cannot have another group, or a scheduler was made for it. The optimizer
                is unchanged.
        """
        if not parameters:
            msg = "Optimizer gets no group: expected parameters to train, got none."
            raise OptionsError(msg)
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            kind = type(optimizer).__name__
            msg = f"Optimizer must be one of torch.optim, got {kind}. Make one first."
            raise OptionsError(msg)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        num_known = sum(id(parameter) in known for parameter in parameters)
        if num_known:
            msg = (
                f"Optimizer has {num_known} of the {len(parameters)} parameters already: expected "
                "others. Add them once."
            )
            raise OptionsError(msg)
        if len({id(parameter) for parameter in parameters}) != len(parameters):
            msg = (
                f"Optimizer gets {len(parameters)} parameters, some of them twice: expected each "
                "once. Leave out the others."
            )
            raise OptionsError(msg)
        _check_options(optimizer, options)
        if isinstance(optimizer, torch.optim.LBFGS):
            msg = (
                "Optimizer LBFGS has a single group: expected one that trains every group. Make it "
                "with the parameters, or use another."
            )
            raise OptionsError(msg)
        if _had_scheduler(optimizer):
            msg = (
                "Optimizer has, or had, a learning-rate scheduler, which knows the groups there "
                "were: expected none yet. Make another optimizer, and its scheduler after adding "
                "the parameters."
            )
            raise OptionsError(msg)
        try:
            optimizer.add_param_group({"params": list(parameters), **options})
        except (TypeError, ValueError) as err:
            msg = f"Optimizer {type(optimizer).__name__} refuses the group: {err}."
            raise OptionsError(msg) from err
        _fill_state(optimizer)
        return cls(optimizer, parameters)

    def remove(self) -> None:
        """Take the group out, and what the optimizer kept for its parameters; harmless twice.

        A scheduler made since then knows the group, and must be made anew.
        """
        own = {id(parameter) for parameter in self._parameters}
        groups = self._optimizer.param_groups
        # By parameters, since loading a state makes other dictionaries.
        groups[:] = [
            group
            for group in groups
            if not (group["params"] and own.issuperset(map(id, group["params"])))
        ]
        for parameter in self._parameters:
            self._optimizer.state.pop(parameter, None)


def _check_options(optimizer: torch.optim.Optimizer, options: Mapping[str, Any]) -> None:
    """Refuse options that the optimizer would keep and never read."""
    known = sorted(
        {*optimizer.defaults, *(key for group in optimizer.param_groups for key in group)}
        - {"params"}
    )
    unknown = sorted(options.keys() - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Leave them out."
        msg = (
            f"Optimizer {type(optimizer).__name__} has no options {listed(unknown)}: expected some "
            f"of {listed(known, most=9)}. {hint}"
        )
        raise OptionsError(msg)


def _had_scheduler(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a scheduler was made that wants as many groups as there were.

    Nobody can tell whether it still exists: it knows the optimizer, and not the other way round.
    `ReduceLROnPlateau` leaves no trace, and takes whatever groups there are.
    """
    step = vars(optimizer).get("step")
    # What torch's schedulers put in place of the method.
    return hasattr(getattr(step, "__func__", step), "_wrapped_by_lr_sched")


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the last group what an optimizer makes at construction only."""
    if isinstance(optimizer, torch.optim.Adagrad):
        group = optimizer.param_groups[-1]
        options = {name: group[name] for name in optimizer.defaults}
        optimizer.state.update(torch.optim.Adagrad(group["params"], **options).state)
