"""Two processes with half the heads each; the arguments are the base's folder and the results'."""

import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.steps import (
    FEATURES,
    IDS,
    LORA,
    PROMPTS,
    Results,
    edit,
    facade,
    logits,
    refusal,
    train,
)
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, conditioned
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from surgery_core import Session, diagnose, is_sharded, verify

base, folder = Path(sys.argv[1]), Path(sys.argv[2])
logging.getLogger("transformers").setLevel(logging.ERROR)
torch.set_num_threads(1)


def spread(dtype=torch.float64):
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(base, distributed_config=config, dtype=dtype).eval()


def gradients(model):
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


model = spread()
rank = dist.get_rank()
results = Results(folder)
results.fact(
    sharded=sum(map(is_sharded, model.parameters())),
    notes=[str(found) for found in diagnose(model)],
)

# An untrained adapter, from other random numbers in each process.
expected = logits(model)
edited = edit(model, seed=rank, is_open=False)
results.fact(is_exact=torch.equal(expected, logits(model)))
results.fact(checks=[[c.tier, c.status] for c in verify(edited, {"input_ids": IDS}).checks])
results.tensors("first", edited.tensors("a"))
edited.revert()
results.fact(is_reverted=torch.equal(expected, logits(model)))

# Gradients, with a gate for each head and with one for the layer, with an activation, and with a
# prompt for each row.
for name, options in {
    "head": {},
    "layer": {"gate": "layer"},
    "tanh": {"gate_activation": "tanh"},
    "conditioned": {"condition_size": 5, "condition_rank": 2},
}.items():
    edited = edit(model, a={**PROMPTS, "options": {**PROMPTS["options"], **options}})
    with conditioned(FEATURES):
        results.tensors(f"logits {name}", {"": logits(model)})
        results.tensors(f"gradients {name}", gradients(model))
    model.zero_grad()
    edited.revert()

# Training, and what is saved of it, for this class and for recipes.
edited = edit(model, seed=rank)
results.fact(losses=train(model))
results.tensors("trained", edited.tensors("a"))
# Twice, since keys and values are kept after the first pass where they can be.
results.tensors("after", {"logits": logits(model), "again": logits(model)})
Session().save(edited, folder / "record")
edited.revert()
adapted = facade(model, seed=rank)
train(adapted)
results.tensors("facade", {"logits": logits(adapted)})
adapted.save_pretrained(folder / "adapter")
adapted.unload()
adapted = AdaptionPromptModel.from_pretrained(model, folder / "adapter", base_check="error")
results.tensors("loaded", {"logits": logits(adapted)})
adapted.load_adapter(folder / "adapter", "twin")
with adapted.activated(["default", "__base__", "twin", "default"]):
    results.tensors("rows", {"logits": logits(adapted)})
adapted.unload()

# What needs whole weights.
short = AdaptionPromptConfig(adapter_len=1, adapter_layers=2)
adapted = AdaptionPromptModel(model, {"default": short}, "default")


def fixed_rows():
    with adapted.fixed_rows(2):
        pass


results.fact(
    merge=refusal(adapted.merge_adapter),
    fixed_rows=refusal(fixed_rows),
)
adapted.unload()
scale = {"operation": "scale_shift"}
copy = {"operation": "trainable_copy", "options": {"modules": ["lm_head"]}}
results.fact(
    low_rank=refusal(lambda: edit(model, a=LORA)),
    scale_shift=refusal(lambda: edit(model, a=scale)),
    trainable_copy=refusal(lambda: edit(model, a=copy)),
    is_unchanged=torch.equal(expected, logits(model)),
)
dist.destroy_process_group()
