"""The plan of one adapter of a recipe."""

from dataclasses import dataclass

from torch import nn

from surgery_core.errors import DriftError
from surgery_core.operation import BoundRule, Saved
from surgery_core.surgery import Plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterPlan:
    """An adapter that was planned.

    Args:
        rules: What makes it up, options complete.
        plan: For the model as it is without rules and adapters.
        saved: The tensors it starts from; None for the operation's own.
    """

    rules: tuple[BoundRule, ...]
    plan: Plan
    saved: Saved | None

    def again(self, name: str, model: nn.Module) -> Plan:
        """Plan the adapter for the model with the rules applied; the edits are those planned.

        Args:
            name: Of the adapter.
            model: The model.

        Raises:
            DriftError: The edits are others.
        """
        found = Plan.draft(model, self.rules)
        if found.document.edits != self.plan.document.edits:
            msg = (
                f"Adapter {name!r} would be another after the rules: expected the edits planned, "
                f"got {found.document.render()}. Keep the rules from changing what it is for."
            )
            raise DriftError(msg, fqns=[edit.fqn for edit in found.document.edits])
        return found
