"""Prompts that start from a text: what each attention module sees of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.parts import PROMPT
from surgery_core import OptionsError

Tokenizer = Callable[..., Mapping[str, Any]]
"""A transformers tokenizer, as far as it is used here."""


def prompts_from_text(
    model: nn.Module,
    modules: Mapping[str, AdaptedAttention],
    text: str,
    tokenizer: Tokenizer,
) -> dict[str, Tensor]:
    """Return prompts made of the hidden states that attention modules get for a text.

    A prompt made so gives the keys and values that the base computes for the text itself, but for
    rotary embedding and key norm. Fewer tokens than the prompt is long are repeated in turn.

    Args:
        model: The base, without adapters in it; run once, in eval mode and without gradients.
        modules: Adapted modules by FQN in the base.
        text: At most as many tokens as the prompts are long.
        tokenizer: The base's; special tokens it adds count.

    Returns:
        `{fqn}.adaption_prompt`, `(1, adapter_len, hidden)`, dtype of the base's hidden states.

    Raises:
        OptionsError: The text has no tokens, or too many.
    """
    ids = torch.tensor([list(tokenizer(text)["input_ids"])])
    length = min(module.adaption_prompt.shape[1] for module in modules.values())
    if not 1 <= ids.shape[1] <= length:
        msg = (
            f"init_from_text must have between 1 and {length} tokens (adapter_len), got "
            f"{ids.shape[1]}. Shorten the text, or raise adapter_len."
        )
        raise OptionsError(msg)
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        for fqn in modules:
            hook = partial(_keep, seen, fqn)
            handle = model.get_submodule(fqn).register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        device = next(model.parameters()).device
        model(input_ids=ids.to(device))
    repeats = -(-length // ids.shape[1])
    return {
        # (1, tokens, hidden) -> (1, adapter_len, hidden)
        f"{fqn}.{PROMPT}": hidden.repeat(1, repeats, 1)[:, :length]
        for fqn, hidden in seen.items()
    }


def _keep(
    seen: dict[str, Tensor],
    fqn: str,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    seen[fqn] = cast("Tensor", kwargs.get("hidden_states", args[0] if args else None))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a while, and each module back in its own mode after that."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
