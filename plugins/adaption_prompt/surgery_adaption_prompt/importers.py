"""Adapters that other programs trained: LLaMA-Adapter's and litgpt's checkpoints, read only."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery_adaption_prompt.architectures import architecture_of, attention_modules
from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.config import AdaptionPromptConfig, GateActivation
from surgery_adaption_prompt.parts import GATE, PROMPT
from surgery_core import (
    ContractError,
    NoMatchError,
    StateError,
    SurgeryWarning,
    listed,
    load_pickled,
)

QUERY = "adapter_query.weight"
"""LLaMA-Adapter's name for the prompts of all adapted layers."""


def read_llama_adapter(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    adapter_len: int,
    gate_activation: GateActivation,
) -> tuple[AdaptionPromptConfig, dict[str, Tensor]]:
    """Read an adapter of LLaMA-Adapter V1, the `.pth` file its extraction script writes.

    The file says neither how long the prompts are nor what is applied to the gates, so the caller
    does. Pass the result to `AdaptionPromptModel.add_adapter`.

    Args:
        path: The file; nothing but tensors is read from it.
        model: The base model, of transformers, with or without adapters in it. LLaMA's weights as
            transformers converts them: it reorders queries and keys alike, within each head, so
            logits and therefore adapters stay.
        adapter_len: K, the length of each adaption prompt, in tokens; 10 in the released adapters.
        gate_activation: What to apply to the gates: `"tanh"` as the training code does, or
            `"identity"` as the inference code of the first releases does.

    Returns:
        The configuration, and the tensors by `fqn.name` on the CPU, in the dtype they have.

    Raises:
        SurgeryError: The file cannot be read, or holds more than tensors by name.
        StateError: Keys are missing or unexpected, a shape does not fit the model, a value is not
            finite, or a layer without a prompt has a gate that is not zero; all are named.
        OptionsError: `adapter_len` or `gate_activation` is out of its range.
        ContractError: The model is not one of transformers, or cannot be adapted.
        NoMatchError: The model has no attention modules.

    Source:
        github.com/OpenGVLab/LLaMA-Adapter, alpaca_finetuning_v1 (the layout of the file; no code).
        `adapter_query.weight`, `(L * K, hidden)`: rows of the lowest adapted layer first, the L
        topmost layers being adapted. `layers.{i}.attention.gate`, `(1, heads, 1, 1)`, or `(1,)` in
        the first release: for every layer of the model; zero and unused below the adapted ones.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=2, **sizes))
        >>> adapter = {
        ...     "adapter_query.weight": torch.ones(4, 8),
        ...     "layers.1.attention.gate": torch.ones(1, 2, 1, 1),
        ... }
        >>> with TemporaryDirectory() as folder:
        ...     path = f"{folder}/adapter.pth"
        ...     torch.save(adapter, path)
        ...     config, state = read_llama_adapter(
        ...         path, base, adapter_len=4, gate_activation="tanh"
        ...     )
        >>> config.adapter_layers, config.gate
        (1, 'head')
        >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
        {'model.layers.1.self_attn.adaption_prompt': (1, 4, 8),
         'model.layers.1.self_attn.adaption_gate': (2,)}
    """
    config = AdaptionPromptConfig(
        adapter_len=adapter_len, adapter_layers=1, gate_activation=gate_activation
    )
    layers = _layers_of(model)
    tensors = load_pickled(path, subject=f"Checkpoint {os.fspath(path)!r}")
    names = [f"layers.{i}.attention.gate" for i in range(len(layers))]
    report = _Report(unexpected=tensors.keys() - {QUERY, *names})
    gates = {}
    for name, layer in zip(names, layers, strict=True):
        if report.accepts(tensors, name, [(1,), (1, layer.heads, 1, 1)]):
            gates[name] = tensors[name]
    num_adapted = _num_blocks(report, tensors, layers, adapter_len)
    if num_adapted is not None:
        unused, used = names[:-num_adapted], names[-num_adapted:]
        report.missing.update(set(used) - tensors.keys())
        report.mismatched += [
            f"{name}: expected zero, since adapter_len={adapter_len} leaves no prompt for this layer"
            for name in unused
            if name in gates and gates[name].any()
        ]
        gates = {name: gates[name] for name in used if name in gates}
    report.check_alike(gates)
    report.close(
        f"LLaMA-Adapter checkpoint {os.fspath(path)!r}",
        "Pass the adapter_len it was trained with, and the model it was trained for",
    )
    blocks = torch.split(tensors[QUERY], adapter_len)
    adapted = layers[-len(blocks) :]
    config = replace(config, adapter_layers=len(blocks))
    return _assemble(config, adapted, blocks, list(gates.values()))


def read_litgpt(
    path: str | os.PathLike[str], model: nn.Module
) -> tuple[AdaptionPromptConfig, dict[str, Tensor]]:
    """Read an adapter of litgpt (method `adapter`, not `adapter_v2`), its `lit_model.pth.adapter`.

    Its gates have no activation. Pass the result to `AdaptionPromptModel.add_adapter`.

    Args:
        path: The file; nothing but tensors is read from it. Also one of lit-gpt or lit-llama.
        model: The base model, of transformers, with or without adapters in it.

    Returns:
        The configuration, and the tensors by `fqn.name` on the CPU, in the dtype they have.

    Raises:
        SurgeryError: The file cannot be read, or holds more than tensors by name.
        StateError: Keys are missing or unexpected, the adapted layers are not the topmost ones, a
            shape does not fit the model, or a value is not finite; all are named.
        ContractError: The model is not one of transformers, or cannot be adapted.
        NoMatchError: The model has no attention modules.

    Warns:
        SurgeryWarning: litgpt may have computed something else with this adapter, which the file
            does not tell. In 0.5.5 to 0.5.13 its adapter takes other rows of the fused projection for
            keys and values than its attention does, unless there is a single key-value head; and
            it caps the logits of the prompt in models that cap those of the tokens.

    Source:
        github.com/Lightning-AI/litgpt, litgpt/adapter.py, 0.4.13 to 0.5.13 (Apache-2.0). Under
        `model`, or not nested: `transformer.h.{i}.attn.adapter_wte.weight`, `(K, hidden)`, and
        `transformer.h.{i}.attn.gating_factor`, `(1, 1, heads, 1)`, once `(1, heads, 1, 1)`, and
        `(1,)` in lit-llama; from the start layer to the topmost.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=8, num_hidden_layers=2, num_key_value_heads=1, **sizes)
        ... )
        >>> adapter = {
        ...     "transformer.h.1.attn.adapter_wte.weight": torch.ones(4, 8),
        ...     "transformer.h.1.attn.gating_factor": torch.ones(1, 1, 2, 1),
        ... }
        >>> with TemporaryDirectory() as folder:
        ...     path = f"{folder}/lit_model.pth.adapter"
        ...     torch.save({"model": adapter}, path)
        ...     config, state = read_litgpt(path, base)
        >>> config.adapter_len, config.adapter_layers, config.gate
        (4, 1, 'head')
    """
    layers = _layers_of(model)
    tensors = load_pickled(path, subject=f"Checkpoint {os.fspath(path)!r}")
    prompt_names = [f"transformer.h.{i}.attn.adapter_wte.weight" for i in range(len(layers))]
    gate_names = [f"transformer.h.{i}.attn.gating_factor" for i in range(len(layers))]
    pairs = list(zip(prompt_names, gate_names, strict=True))
    # The lowest layer that has either; where there is none, the topmost is the least to expect.
    start = next((i for i, pair in enumerate(pairs) if tensors.keys() & pair), len(layers) - 1)
    expected = {name for pair in pairs[start:] for name in pair}
    report = _Report(missing=expected - tensors.keys(), unexpected=tensors.keys() - expected)
    prompts, gates = {}, {}
    for (prompt, gate), layer in zip(pairs[start:], layers[start:], strict=True):
        # Any number of rows, as long as it is not zero.
        if report.accepts(tensors, prompt, [(None, layer.hidden)]):
            prompts[prompt] = tensors[prompt]
        if report.accepts(tensors, gate, [(1,), (1, 1, layer.heads, 1), (1, layer.heads, 1, 1)]):
            gates[gate] = tensors[gate]
    report.check_alike(prompts)
    report.check_alike(gates)
    report.close(f"litgpt checkpoint {os.fspath(path)!r}", "Pass the model it was trained for")
    _warn_of_deviations(path, model)
    blocks = list(prompts.values())
    config = AdaptionPromptConfig(adapter_len=len(blocks[0]), adapter_layers=len(blocks))
    return _assemble(config, layers[start:], blocks, list(gates.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """What an attention module expects of its prompt and gate."""

    fqn: str
    hidden: int
    heads: int


@dataclass(slots=True, kw_only=True)
class _Report:
    """Problems of a checkpoint, gathered until all of them are known."""

    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    mismatched: list[str] = field(default_factory=list)

    def accepts(
        self,
        tensors: Mapping[str, Tensor],
        name: str,
        shapes: Sequence[tuple[int | None, ...]],
    ) -> bool:
        """Tell whether a tensor is there and fits; None in a shape is any size but zero."""
        if name not in tensors:
            return False
        problem = _problem(tensors[name], shapes)
        if problem is not None:
            self.mismatched.append(f"{name}: {problem}")
        return problem is None

    def check_alike(self, tensors: Mapping[str, Tensor]) -> None:
        """Note the tensors whose shape is not that of the topmost layer's."""
        names = list(tensors)
        for name in names[:-1]:
            own, top = tuple(tensors[name].shape), tuple(tensors[names[-1]].shape)
            if own != top:
                self.mismatched.append(
                    f"{name}: expected shape {top} as in the top layer, got {own}"
                )

    def close(self, subject: str, fix: str) -> None:
        """Raise everything that was noted, if anything was."""
        if self.missing or self.unexpected or self.mismatched:
            msg = (
                f"{subject} does not fit the model: missing {listed(sorted(self.missing))}; "
                f"unexpected {listed(sorted(self.unexpected))}; mismatched "
                f"{listed(sorted(self.mismatched))}. {fix}."
            )
            raise StateError(
                msg,
                missing=self.missing,
                unexpected=self.unexpected,
                mismatched=self.mismatched,
            )


def _layers_of(model: nn.Module) -> list[_Layer]:
    """Return the attention modules' sizes, lowest layer first."""
    if not isinstance(model, PreTrainedModel):
        found = type(model).__name__
        msg = (
            f"Adapters are read for a model of transformers: expected a PreTrainedModel, got {found}."
            " Pass the base model; get_base_model() returns it."
        )
        raise ContractError(msg, fqn="", expected="a PreTrainedModel", actual=found)
    modules = attention_modules(dict(model.named_modules()))
    if not modules:
        msg = (
            f"{type(model).__name__} has no attention module to read an adapter for: expected modules "
            "that use transformers' attention interface. Pass a decoder of transformers 5."
        )
        raise NoMatchError(msg, selector="attention modules", candidates=())
    layers = []
    for fqn, module in modules.items():
        base = module.base_attention if isinstance(module, AdaptedAttention) else module
        hidden, heads = architecture_of(base, fqn=fqn).sizes(base)
        layers.append(_Layer(fqn=fqn, hidden=hidden, heads=heads))
    return layers


def _problem(tensor: Tensor, shapes: Sequence[tuple[int | None, ...]]) -> str | None:
    is_dense = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested
    if not (is_dense and tensor.is_floating_point()):
        return f"expected a dense floating-point tensor, got {tensor.dtype} with {tensor.layout}"
    own = tuple(tensor.shape)
    if not any(_fits(own, shape) for shape in shapes):
        wanted = " or ".join(str(shape).replace("None", "1 or more") for shape in shapes)
        return f"expected shape {wanted}, got {own}"
    # Wide, since not every dtype knows of isfinite.
    if not torch.isfinite(tensor.double()).all():
        return "values are not finite"
    return None


def _fits(own: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(own) == len(shape) and all(
        size == wanted if wanted is not None else size > 0
        for size, wanted in zip(own, shape, strict=True)
    )


def _num_blocks(
    report: _Report, tensors: Mapping[str, Tensor], layers: Sequence[_Layer], adapter_len: int
) -> int | None:
    """Return how many layers LLaMA-Adapter's prompts are for, or note why that is not known."""
    if QUERY not in tensors:
        report.missing.add(QUERY)
        return None
    if not report.accepts(tensors, QUERY, [(None, layers[-1].hidden)]):
        return None
    rows = len(tensors[QUERY])
    count = rows // adapter_len
    if rows % adapter_len or count > len(layers):
        report.mismatched.append(
            f"{QUERY}: expected adapter_len={adapter_len} rows for each of 1 to {len(layers)} layers, "
            f"got {rows}"
        )
        return None
    return count


def _assemble(
    config: AdaptionPromptConfig,
    layers: Sequence[_Layer],
    prompts: Sequence[Tensor],
    gates: Sequence[Tensor],
) -> tuple[AdaptionPromptConfig, dict[str, Tensor]]:
    state: dict[str, Tensor] = {}
    for layer, prompt, gate in zip(layers, prompts, gates, strict=True):
        # Copies, so that none shares memory with the others. (1, adapter_len, hidden)
        state[f"{layer.fqn}.{PROMPT}"] = prompt.clone().unsqueeze(0)
        # (heads,) or (1,), whichever axis the heads are on.
        state[f"{layer.fqn}.{GATE}"] = gate.clone().flatten()
    return replace(config, gate="layer" if gates[0].ndim == 1 else "head"), state


def _warn_of_deviations(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Warn where litgpt may have computed something else; see `read_litgpt`."""
    config = model.config
    reasons = []
    if getattr(config, "num_key_value_heads", None) != 1:
        reasons.append(
            "litgpt 0.5.5 to 0.5.13 use other rows of the fused projection for the prompt's keys and "
            "values, so an adapter trained by them acts differently here"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        reasons.append("litgpt caps the logits of the prompt, which is not done here")
    if reasons:
        msg = (
            f"litgpt checkpoint {os.fspath(path)!r} may not act as it did in litgpt: "
            f"{'; '.join(reasons)}. Compare the outputs of both."
        )
        warnings.warn(msg, SurgeryWarning, stacklevel=3)
