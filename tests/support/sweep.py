"""What becomes of each model type: right, refused with the reason, or not to be had tiny here."""

import copy
import inspect
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from surgery_adaption_prompt import AdaptedAttention, AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.architectures import attention_modules

from support.caches import cache_of, with_cache
from support.families import open_gates_, randomize_
from support.reference import kv_weights, reference_term
from support.tiny import VOCAB, tiny_model
from surgery_core import SurgeryError

CONFIG = {"adapter_len": 3, "gate": "head"}
FLOAT64 = 1e-6
"""Relative to the largest logit: some models compute norms or softmax in float32."""
CACHED = 1e-5
"""The same for decoding with a cache, where bases differ from themselves by up to `FLOAT64`."""


@dataclass(frozen=True)
class Verdict:
    """What was found of a model type.

    Args:
        kind: `"right"`, `"refused"`, `"not tiny"` or `"wrong"`.
        detail: How many layers it has to adapt; or why not.
    """

    kind: str
    detail: str


def judge(model_type):  # noqa: PLR0911 (one for each verdict)
    """Try a model type in every way, and say what came of it."""
    torch.manual_seed(0)
    try:
        model, half = (tiny_model(model_type, dtype) for dtype in (torch.float64, torch.bfloat16))
    except Exception as err:  # noqa: BLE001 (whatever a default configuration raises)
        return Verdict("not tiny", _first_line(err))
    attentions = attention_modules(dict(model.named_modules()))
    if not attentions:
        return Verdict("refused", "no causal attention that uses the attention interface")
    config = AdaptionPromptConfig(adapter_layers=min(2, len(attentions)), **CONFIG)
    try:
        AdaptionPromptModel(model, {"a": config}, "a").unload()
    except SurgeryError as err:
        return Verdict("refused", _reason(err))
    randomize_(model, 0)
    ids = torch.randint(3, VOCAB - 2, (2, 6))
    try:
        with torch.no_grad():
            first, second = (copy.deepcopy(model)(input_ids=ids).logits for _ in range(2))
    except Exception as err:  # noqa: BLE001 (whatever a tiny model raises)
        return Verdict("not tiny", f"does not run: {_first_line(err)}")
    if not torch.isfinite(first).all() or not torch.equal(first, second):
        return Verdict(
            "not tiny", "the base's own logits are not finite, or differ from run to run"
        )
    try:
        _check(model, config, ids)
        _check_half(half, config, ids)
    except Exception as err:  # noqa: BLE001 (an adapted model that raises is wrong too)
        return Verdict("wrong", _first_line(err))
    return Verdict("right", str(len(attentions)))


def _check(model, config, ids):
    """Raise an AssertionError that says what is wrong.

    Everything runs on copies, since some models keep state between runs.
    """
    pristine = copy.deepcopy(model)
    with torch.no_grad():
        expected = copy.deepcopy(model)(input_ids=ids).logits
        adapted = AdaptionPromptModel(model, {"a": config}, "a")
        with _counted() as calls:
            untrained = copy.deepcopy(adapted)(input_ids=ids).logits
        assert torch.equal(expected, untrained), "an untrained adapter changes logits"
        assert sorted(calls.values()) == [1] * config.adapter_layers, f"calls: {dict(calls)}"
        open_gates_(adapted.adapter_modules("a"))
        actual = copy.deepcopy(adapted)(input_ids=ids).logits
        reference = _reference(copy.deepcopy(pristine), adapted, ids)
        assert _error(actual, expected) > FLOAT64, "open gates change nothing"
        error = _error(actual, reference)
        assert error < FLOAT64, f"differs from the formula by {error:.1e}"
        # Some bases decode otherwise than they run; an adapter cannot mend that.
        if _error(_decoded(copy.deepcopy(pristine), ids), expected) < FLOAT64:
            error = _error(_decoded(copy.deepcopy(adapted), ids), actual)
            assert error < CACHED, f"cached decoding differs by {error:.1e}"
    _check_gradients(adapted, ids)


def _check_half(model, config, ids):
    """Raise an AssertionError that says what is wrong in bfloat16, with adapters in float32."""
    randomize_(model, 0)
    with torch.no_grad():
        expected = copy.deepcopy(model)(input_ids=ids).logits
        adapted = AdaptionPromptModel(model, {"a": config}, "a")
        untrained = copy.deepcopy(adapted)(input_ids=ids).logits
        assert torch.equal(expected, untrained), "an untrained adapter changes bfloat16 logits"
        open_gates_(adapted.adapter_modules("a"))
        actual = copy.deepcopy(adapted)(input_ids=ids).logits
    assert not torch.equal(expected, actual), "open gates change no bfloat16 logits"
    assert torch.isfinite(actual)[torch.isfinite(expected)].all(), "bfloat16 logits are not finite"
    _check_gradients(adapted, ids)


def _check_gradients(adapted, ids):
    adapted(input_ids=ids).logits.logsumexp(-1).sum().backward()
    for module in adapted.adapter_modules("a").values():
        gradient = module.adaption_gate.grad
        assert gradient is not None, "a gate gets no gradient"
        assert torch.isfinite(gradient).all(), "a gate's gradient is not finite"
        assert gradient.any(), "a gate's gradient is zero"


def _decoded(model, ids):
    """Return logits of a prefill of three tokens and single steps after it; NaN if it cannot."""
    with suppress(Exception):
        out = model(input_ids=ids[:, :3], use_cache=True)
        parts = [out.logits]
        for at in range(3, ids.shape[1]):
            past = with_cache(cache_of(out))
            out = model(input_ids=ids[:, at : at + 1], use_cache=True, **past)
            parts.append(out.logits)
        return torch.cat(parts, dim=1)
    return torch.full((*ids.shape, 1), torch.nan)


@contextmanager
def _counted():
    """Count how often each adapted layer adds its term."""
    calls = Counter()
    add_prompt = AdaptedAttention.add_prompt

    def counting(self, *args, **kwargs):
        calls[id(self)] += 1
        return add_prompt(self, *args, **kwargs)

    AdaptedAttention.add_prompt = counting
    try:
        yield calls
    finally:
        AdaptedAttention.add_prompt = add_prompt


def _reference(model, adapted, ids):
    """Run the unadapted model with the term of the formula added by the attention functions."""
    modules = adapted.adapter_modules("a")
    adapters = {model.get_submodule(fqn): module for fqn, module in modules.items()}
    namespace = inspect.unwrap(type(next(iter(adapters))).forward).__globals__
    table, eager = namespace["ALL_ATTENTION_FUNCTIONS"], namespace["eager_attention_forward"]

    def wrap(function):
        def attend(module, query, *args, **kwargs):
            output, weights = function(module, query, *args, **kwargs)
            if module in adapters:
                output = output + reference_term(
                    query,
                    adapters[module].adaption_prompt[0].to(query.dtype),
                    adapters[module].adaption_gate.to(query.dtype),
                    kv_weights(module),
                    scaling=kwargs["scaling"],
                    activation="identity",
                )
            return output, weights

        return attend

    table["sdpa"], namespace["eager_attention_forward"] = wrap(table["sdpa"]), wrap(eager)
    try:
        return model(input_ids=ids).logits
    finally:
        del table["sdpa"]
        namespace["eager_attention_forward"] = eager


def _error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _first_line(err):
    return f"{type(err).__name__}: {str(err).strip().splitlines()[-1][:120]}"


def _reason(err):
    """Return what an error says was found, without where it was and what to do."""
    text = str(err)
    return text[text.index(" got ") + len(" got ") :].partition(". ")[0]
