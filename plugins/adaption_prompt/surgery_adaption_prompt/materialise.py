"""A weighted sum of adapters as one adapter, where that is exact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.functional import activate_gate
from surgery_adaption_prompt.parts import GATE, PROMPT
from surgery_core import OptionsError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """One adapter at one module, in a dtype wide enough to calculate with."""

    module: AdaptedAttention
    weight: float

    @property
    def prompt(self) -> Tensor:
        return self.module.adaption_prompt.detach().double()

    @property
    def gate(self) -> Tensor:
        """Activated and weighted, `(1,)` or `(num_attention_heads,)`."""
        (part,) = self.module.prompts
        gate = activate_gate(
            self.module.adaption_gate.detach().double(), part.config.gate_activation
        )
        return gate * self.weight


def materialised(
    adapters: Sequence[tuple[AdaptionPromptConfig, Mapping[str, AdaptedAttention], float]],
) -> tuple[AdaptionPromptConfig, dict[str, Tensor]]:
    """Write a weighted sum of adapters as one adapter.

    Each adapter has a softmax of its own, so the sum is one adapter's term only if the softmaxes
    are the same, or have nothing to choose from. It is exact for one adapter, for adapters with
    equal prompts (gates add), and for prompts of one token (`adapter_len=1`) with one gate for all
    heads (gated prompts add, since the value projection is linear).

    Args:
        adapters: Configuration, modules by FQN and weight of each, at least one.

    Returns:
        Configuration and tensors, by `fqn.name`, of an adapter that computes the same up to
        rounding; its gate has no activation.

    Raises:
        OptionsError: The sum is no adapter's term, or an adapter is conditioned.

    Source:
        Sum over adapters a of w_a g_a softmax(q K_a^T) V_a; see `gated_prompt_attention`.
    """
    fqns = sorted({fqn for _, modules, _ in adapters for fqn in modules})
    if any(config.condition_size is not None for config, _, _ in adapters):
        _refuse(fqns[0], "prompts depend on features")
    state: dict[str, Tensor] = {}
    for fqn in fqns:
        shares = [
            _Share(module=modules[fqn], weight=weight)
            for _, modules, weight in adapters
            if fqn in modules
        ]
        prompt, gate = _sum(shares, fqn)
        dtype = torch.promote_types(shares[0].module.adaption_prompt.dtype, torch.float32)
        state |= {f"{fqn}.{PROMPT}": prompt.to(dtype), f"{fqn}.{GATE}": gate.to(dtype)}
    configs = [config for config, _, _ in adapters]
    if len({config.project_output for config in configs}) > 1:
        _refuse(fqns[0], "some add their terms before the output projection, and some after it")
    heads = {state[f"{fqn}.{GATE}"].shape[0] for fqn in fqns}
    if len(heads) > 1:
        # Layers where some adapters have a gate for each head, and layers where none has.
        for fqn in fqns:
            state[f"{fqn}.{GATE}"] = state[f"{fqn}.{GATE}"].expand(max(heads)).clone()
    return (
        AdaptionPromptConfig(
            base_model_name_or_path=configs[0].base_model_name_or_path,
            task_type=configs[0].task_type,
            target_modules=configs[0].target_modules,
            inference_mode=all(config.inference_mode for config in configs),
            adapter_len=state[f"{fqns[0]}.{PROMPT}"].shape[1],
            adapter_layers=len(fqns),
            gate="layer" if heads == {1} else "head",
            dtype=configs[0].dtype,
            project_output=configs[0].project_output,
        ),
        state,
    )


def _sum(shares: Sequence[_Share], fqn: str) -> tuple[Tensor, Tensor]:
    """Return prompt and gate of the sum at one module."""
    first = shares[0].prompt
    if all(torch.equal(share.prompt, first) for share in shares):
        return first, sum((share.gate for share in shares[1:]), start=shares[0].gate)
    lengths = sorted({share.prompt.shape[1] for share in shares})
    if lengths != [1]:
        _refuse(fqn, f"prompts differ and have {' and '.join(map(str, lengths))} tokens")
    gates = [share.gate for share in shares]
    if any(not torch.equal(gate, gate[:1].expand_as(gate)) for gate in gates):
        _refuse(fqn, "prompts differ and so do the gates of their heads")
    total = sum((gate[:1] for gate in gates[1:]), start=gates[0][:1])
    prompt = sum((s.prompt * s.gate[0] for s in shares[1:]), start=first * shares[0].gate[0])
    if not _has_bias(shares[0].module):
        return prompt, torch.ones(1, dtype=prompt.dtype)
    # The projection adds its bias once for each adapter, so the gate must be what they add up to.
    if total.abs() < 1e-6:  # noqa: PLR2004 (beyond it, rounding in float32 would be larger than the sum)
        _refuse(fqn, "the weighted gates add up to zero and the value projection has a bias")
    return prompt / total, total


def _has_bias(module: AdaptedAttention) -> bool:
    children = module.architecture.linear_projections(module)
    if children is None:
        _refuse("its projections", "they are not known to be linear")
    return any(getattr(child, "bias", None) is not None for child in children or ())


def _refuse(fqn: str, reason: str) -> None:
    msg = (
        f"Weighted sum is no single adapter at {fqn!r}: {reason}. Activate a composition instead, "
        "as in set_adapter({'fr': 0.7, 'legal': 0.3})."
    )
    raise OptionsError(msg)
