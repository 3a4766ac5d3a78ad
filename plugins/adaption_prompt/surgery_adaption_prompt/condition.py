"""Features that conditioned prompts depend on: handed over for a forward, and looked up in it."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_core import OptionsError, listed

_FEATURES: ContextVar[Tensor | None] = ContextVar("surgery_adaption_prompt_features", default=None)
"""Each thread and each asyncio task has its own."""


@contextmanager
def conditioned(features: Tensor) -> Iterator[None]:
    """Hand features to the conditioned adapters that run inside, in this thread or asyncio task.

    `AdaptionPromptModel` does the same for `forward(..., condition=features)` and `generate`. A
    thread that is started inside does not inherit it. Models without a conditioned adapter do not
    look at it.

    Args:
        features: `(rows, condition_size)`, floating-point, finite; zeros for a row without any. A
            batch of n times as many rows gives each to n rows in succession, as beam search lays
            them out. Gradients reach it.

    Raises:
        OptionsError: It is no such tensor.

    Source:
        Zhang et al. 2023, arXiv:2303.16199, multi-modal reasoning; `features` are their I_p.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from surgery_adaption_prompt import AdaptionPromptConfig, get_peft_model
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=2, **sizes))
        >>> config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, condition_size=3)
        >>> model = get_peft_model(base, config)
        >>> with conditioned(torch.ones(1, 3)):
        ...     model(torch.tensor([[1, 2]])).logits.shape
        torch.Size([1, 2, 8])
    """
    check_features(features)
    with _handed(features):
        yield


def check_features(features: object) -> None:
    """Refuse what cannot be the features of any adapter.

    Raises:
        OptionsError: It is no floating-point tensor with two axes and at least one row.
    """
    if not isinstance(features, Tensor):
        got = type(features).__name__
    elif features.ndim != 2 or not features.shape[0] or not features.is_floating_point():  # noqa: PLR2004 (rows and sizes)
        got = f"{str(features.dtype).removeprefix('torch.')} of shape {tuple(features.shape)}"
    else:
        return
    msg = (
        "Features are invalid: expected a floating-point tensor (rows, condition_size) with at "
        f"least one row, got {got}. Pass one row of features for each row of the batch."
    )
    raise OptionsError(msg)


def features_for(batch: int, size: int) -> Tensor:
    """Return the features that were handed to the running code, `(rows, condition_size)`.

    Args:
        batch: Number of rows that ask, a multiple of those of the features.
        size: `condition_size` of the adapter.

    Raises:
        OptionsError: There are none, or they do not fit; or a program is exported, which would keep
            the features of now for ever.
    """
    if torch.compiler.is_exporting():
        msg = (
            "Conditioned adapter cannot be exported: expected a forward that takes features, got "
            "an exported program, which would have those of now for ever. Use torch.compile."
        )
        raise OptionsError(msg)
    features = _uncompiled_features() if torch.compiler.is_compiling() else _FEATURES.get()
    if features is None:
        msg = (
            f"Conditioned adapter runs without features: expected some of shape (rows, {size}), "
            "got none. Pass condition= to the model or run it in `with conditioned(features):`; "
            "rows without any get zeros."
        )
        raise OptionsError(msg)
    check_fit(features, size=size, batch=batch)
    return features


def check_fit(features: Tensor, *, size: int, batch: int | None) -> None:
    """Refuse features that do not fit an adapter and a batch.

    Args:
        features: `(rows, condition_size)`.
        size: `condition_size` of the adapter.
        batch: Number of rows that are to get them; None if it is not known.

    Raises:
        OptionsError: They have another size, or the batch is no multiple of their rows.
    """
    rows, found = features.shape
    if found != size:
        msg = (
            f"Features do not fit the adapter: expected condition_size={size} for each row, got "
            f"{found}. Pass features of the kind that the adapter was trained with."
        )
        raise OptionsError(msg)
    if batch is not None and batch % rows:
        msg = (
            f"Features do not fit the batch: expected {batch} rows, or a number that divides it, "
            f"got {rows}. Pass one row of features for each row of the batch."
        )
        raise OptionsError(msg)


def with_features_of_now(context: AbstractContextManager[object]) -> AbstractContextManager[None]:
    """Return a context for later that has the features of the code that runs now.

    Args:
        context: Entered with it.
    """
    return _together(_handed(_FEATURES.get()), context)


def require_unconditioned(
    names: Collection[str], configs: Mapping[str, AdaptionPromptConfig], *, what: str
) -> None:
    """Refuse conditioned adapters where a prompt must be the same for whoever asks.

    Args:
        names: Adapters that are to take part.
        configs: By adapter name.
        what: What cannot be done with them, as the error's subject.

    Raises:
        OptionsError: Some of them are conditioned; all are named.
    """
    found = sorted(name for name in names if configs[name].condition_size is not None)
    if found:
        msg = (
            f"{what} is not possible with conditioned adapters: expected adapters without "
            f"condition_size, got {listed(found)}. Give the whole batch one adapter with "
            "set_adapter or activated."
        )
        raise OptionsError(msg)


@contextmanager
def _handed(features: Tensor | None) -> Iterator[None]:
    token = _FEATURES.set(features)
    try:
        yield
    finally:
        _FEATURES.reset(token)


@contextmanager
def _together(
    first: AbstractContextManager[object], second: AbstractContextManager[object]
) -> Iterator[None]:
    with first, second:
        yield


@torch.compiler.disable(reason="features differ from call to call: compile without fullgraph")  # type: ignore[untyped-decorator,no-untyped-call]
def _uncompiled_features() -> Tensor | None:
    return _FEATURES.get()
