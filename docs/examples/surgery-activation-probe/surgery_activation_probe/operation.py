"""What is put in the place of a module to watch its output, and the operation that does it."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from surgery_core import ContractError, Effects, Glob, Operation, OptionsError, Site, TensorSpec


class ProbeOptions(BaseModel, extra="forbid", strict=True, frozen=True):
    """What a rule may say of a probe."""

    per_channel: bool = Field(default=False, description="One mean for each output feature.")


class Statistics(nn.Module):
    """The mean and the largest absolute value of everything it was called with.

    Args:
        shape: `(features,)` for values of each feature, which are the last axis; else `()`.
        device: Of the buffers.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("mean_abs", torch.zeros(shape, dtype=torch.float32, device=device))
        self.register_buffer("max_abs", torch.zeros(shape, dtype=torch.float32, device=device))

    @torch.no_grad()
    def forward(self, output: Tensor) -> None:
        """Count an output in; it is not changed."""
        # (..., features) -> (rows, features); (...) -> (values,)
        rows = output.detach().float().abs().reshape(-1, *self.mean_abs.shape)
        if rows.numel():
            # A module without tensors does not say on which device it computes.
            mean, largest = rows.mean(0).to(self.mean_abs), rows.amax(0).to(self.max_abs)
            self.count.add_(len(rows))
            self.mean_abs.add_((mean - self.mean_abs) * (len(rows) / self.count))
            self.max_abs.copy_(torch.maximum(self.max_abs, largest))


class Probed(nn.Module):
    """A module whose output, or the first of several, is shown to `activation_probe`, a child.

    Its class derives from this one and from the base's, and it shares the base's parameters,
    buffers and hooks: whatever looks for the base's class, attributes or FQNs finds them.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the base's own signature)
        """Run the base's forward, and return what that returns."""
        output = super().forward(*args, **kwargs)
        self.activation_probe(output if isinstance(output, Tensor) else output[0])
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles have to make it again.
        return _blank, (type(self).__bases__[1],), self.__getstate__()


@cache
def _probed_class(base: type[nn.Module]) -> type[Probed]:
    """Return the one class for probed modules of a base class: torch.compile guards on it."""
    return type(f"Probed{base.__name__}", (Probed, base), {"__module__": __name__})


def _blank(base: type[nn.Module]) -> Probed:
    """Return a probed module without any state yet."""
    return Probed.__new__(_probed_class(base))


def _statistics(base: nn.Module, options: ProbeOptions, device: torch.device) -> Statistics:
    """Make the child of a probe: the one place that says which buffers it has for a module."""
    return Statistics((base.out_features,) if options.per_channel else (), device)


class ActivationProbe(Operation[ProbeOptions]):
    """Put a `Probed` in the place of every module that a rule selects."""

    name = "activation_probe"
    summary = "Running statistics of what modules give; no output changes."

    def parse_options(self, options: Mapping[str, Any]) -> ProbeOptions:
        """Validate the options.

        Raises:
            OptionsError: An option is unknown or has the wrong type.
        """
        try:
            return ProbeOptions.model_validate(dict(options))
        except ValidationError as err:
            wrong = "; ".join(f"{found['loc'][0]}: {found['msg']}" for found in err.errors())
            msg = f"Operation {self.name!r} has invalid options: {wrong}. Fix the options."
            raise OptionsError(msg) from None

    def options_schema(self) -> Mapping[str, Any]:
        """Return what `parse_options` accepts."""
        return ProbeOptions.model_json_schema()

    def targets(self, tree: Mapping[str, nn.Module], options: ProbeOptions) -> Glob:  # noqa: ARG002 (neither matters)
        """Choose every module that the rule selects."""
        return Glob("**")

    def describe(self, site: Site, options: ProbeOptions) -> Effects:
        """Return that the buffers of a probe are added.

        Raises:
            ContractError: The module is probed or patched already, or is no Linear for `per_channel`.
        """
        expected = nn.Linear if options.per_channel else nn.Module
        # A patched forward would be called in place of the probe's.
        is_plain = not isinstance(site.module, Probed) and "forward" not in vars(site.module)
        if not (is_plain and isinstance(site.module, expected)):
            msg = (
                f"Operation {self.name!r} cannot work at {site.fqn!r}: expected a {expected.__name__} "
                f"not probed or patched yet, got {type(site.module).__name__}. Exclude it."
            )
            raise ContractError(msg, fqn=site.fqn, expected=expected, actual=type(site.module))
        probe = _statistics(site.module, options, torch.device("meta"))
        specs = (
            TensorSpec(
                name=f"activation_probe.{name}",
                shape=tuple(buffer.shape),
                dtype=str(buffer.dtype).removeprefix("torch."),
                trainable=False,
            )
            for name, buffer in probe.named_buffers()
        )
        return Effects(added=tuple(specs))

    def build(self, site: Site, options: ProbeOptions) -> nn.Module:
        """Return a module with the base's tables, except one of children that has one more."""
        base = site.module
        anchor = (*base.parameters(), *base.buffers(), torch.empty(0))[0]
        new = _blank(type(base))
        vars(new).update(vars(base), _modules=dict(vars(base)["_modules"]))
        # Compiled code of the base would run in place of the probe's forward.
        vars(new).pop("_compiled_call_impl", None)
        new.activation_probe = _statistics(base, options, anchor.device)
        return new
