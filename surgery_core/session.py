"""The way in: a session knows its plugins, and plans for a model what rules ask for."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from surgery_core.errors import OptionsError
from surgery_core.plan import BoundRule, Rule
from surgery_core.plugins import Plugins
from surgery_core.surgery import Plan, Surgery
from surgery_core.swap import SwapState


class Session:
    """Plan and apply surgeries with the operations of some plugins.

    Sessions share nothing: each has its own plugin manager.

    Args:
        plugins: Modules or objects with hook implementations.
        discover: Also load installed plugins, from the entry-point group `surgery_core`.

    Raises:
        PluginError: A plugin passed breaks the contract. A broken one that was discovered does
            not raise; see `plugins.broken`.

    Example:
        >>> Session(discover=False).plugins.infos
        ()
    """

    def __init__(self, plugins: Iterable[object] = (), *, discover: bool = True) -> None:
        self.plugins = Plugins(plugins, discover=discover)

    def plan(
        self, model: nn.Module, rules: Sequence[Rule], *, beneath: SwapState | None = None
    ) -> Plan:
        """Work out what the rules would change; the model is not touched.

        Args:
            model: The model to plan for.
            rules: In order; at least one.
            beneath: Plan as if the active variant of this swap state were not in the model.

        Raises:
            UnknownOperationError: A rule names an operation no plugin offers.
            OptionsError: There are no rules, or an operation refuses its options.
            NoMatchError: A rule, or an exclusion, matches nothing.
            ConflictError: Two claims overlap.
            ContractError: A module does not suit its operation.
        """
        if not rules:
            msg = "Rules are empty: expected at least one rule. Name an operation."
            raise OptionsError(msg)
        bound = [
            BoundRule(rule=rule, operation=self.plugins.operation(rule.operation)) for rule in rules
        ]
        return Plan.draft(
            model,
            bound,
            originals=beneath.originals() if beneath is not None else None,
            on_applied=self.plugins.notify_applied,
            on_reverted=self.plugins.notify_reverted,
        )

    @contextmanager
    def applied(self, model: nn.Module, rules: Sequence[Rule]) -> Iterator[Surgery]:
        """Apply the rules for a while, and revert at the end, also after an error.

        Raises:
            SurgeryError: See `plan`, `Plan.apply` and `Surgery.revert`.
        """
        surgery = self.plan(model, rules).apply()
        try:
            yield surgery
        finally:
            if surgery.is_applied:
                surgery.revert()
