"""Continuous batching of transformers answers with the active adapter, or refuses; it never mixes."""

import pytest
import torch
from support.adapted import build
from support.families import open_gates_, tokens
from support.kept import reference_adapters
from support.reference import reference_model
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from transformers import ContinuousBatchingConfig, GenerationConfig

from surgery_core import OptionsError

CONFIG = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, gate="head")
NEW = 6
PREFIX = tokens(1, 12, seed=3)
PROMPTS = [torch.cat([PREFIX, tokens(1, 2, seed=seed)], dim=1) for seed in range(4)]
OPTIONS = {
    "generation_config": GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
}
BLOCKS = ContinuousBatchingConfig(num_blocks=64, page_size=4, max_batch_tokens=64)


def make():
    model = AdaptionPromptModel(build(), {"a": CONFIG, "b": CONFIG}, "a").eval()
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed, size=3.0)
    return model


def greedy(model, name, ids):
    """Return the tokens that the float64 formula gives, one after the other."""
    base = build(dtype=torch.float64)
    adapters = reference_adapters(base, model, name)
    with torch.no_grad(), reference_model(base, adapters, scaling=8**-0.5):
        for _ in range(NEW):
            best = base(ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], dim=1)
    return ids[0, -NEW:].tolist()


def answers(found):
    return {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}


@pytest.mark.slow
def test_a_manager_that_stays_does_not_share_keys_between_adapters():
    """All prompts begin alike, for one adapter after the other, over one paged cache."""
    model = make()
    try:
        for name in "abab":
            model.set_adapter(name)
            found = answers(
                model.generate_batch(
                    [ids[0].tolist() for ids in PROMPTS],
                    continuous_batching_config=BLOCKS,
                    persistent_manager=True,
                    **OPTIONS,
                )
            )
            for ids in PROMPTS:
                assert greedy(model, name, ids) == found[tuple(ids[0].tolist())], name
    finally:
        model.destroy_cached_continuous_batching_manager()
    assert greedy(model, "a", PROMPTS[0]) != greedy(model, "b", PROMPTS[0])


def test_the_configuration_that_was_given_is_kept_but_for_the_sharing():
    model = make()
    manager = model.init_continuous_batching(
        continuous_batching_config=BLOCKS, generation_config=OPTIONS["generation_config"]
    )

    assert 64 == manager.continuous_batching_config.num_blocks
    assert not manager.continuous_batching_config.allow_block_sharing
    assert BLOCKS.allow_block_sharing


@pytest.mark.parametrize(
    "call", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_adapters_that_its_thread_would_not_get_are_refused(call):
    model = make()
    arguments = [[[1, 2, 3]]] if call == "generate_batch" else []
    message = "runs in a thread of its own, with the active adapter for all requests"

    with model.activated("b"), pytest.raises(OptionsError, match=message):
        getattr(model, call)(*arguments)
    with pytest.raises(OptionsError, match=message):
        getattr(model, call)(*arguments, adapter_names=["b"])
