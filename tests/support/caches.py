"""A cache of keys and values, which transformers calls `past_key_values`, and `cache` from 5.24 on."""

import inspect

from transformers import LlamaForCausalLM

NAME = (
    "cache"
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    else "past_key_values"
)


def with_cache(cache):
    """Return the arguments by which a model goes on where a cache ends."""
    return {NAME: cache}


def cache_of(output):
    """Return the cache in what a model returned."""
    return getattr(output, NAME)
