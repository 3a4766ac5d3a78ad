"""Two processes, parameters sharded by `fully_shard`; the argument is the results' folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.steps import (
    LORA,
    PROMPTS,
    Results,
    base,
    edit,
    facade,
    half,
    logits,
    mean,
    optimizer,
    refusal,
    several,
    train,
    turned,
)
from support.families import tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from surgery_core import Session, is_sharded, verify, whole_tensors

folder = Path(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
results = Results(folder)


def shard(model, **options):
    """Shard each layer and then the rest, as the manual says."""
    for layer in model.get_submodule("model.layers"):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def shard_facade(adapted):
    shard(adapted.model)
    return fully_shard(adapted, mesh=mesh)


# -- an untrained adapter, and the way back -------------------------------------------------------

plain = shard(base())
expected = logits(plain)
model = base()
edited = edit(model, is_open=False)
shard(model)
results.fact(
    sharded=[sum(map(is_sharded, model.parameters())), len([*model.parameters()])],
    is_exact=torch.equal(expected, logits(model)),
    # Not whether a revert gives the very model of before, which sharding has changed since.
    checks=[
        c.status for c in verify(edited, {"input_ids": tokens(2, 7)}).checks if c.tier != "revert"
    ],
)
with edited.disabled():
    results.fact(is_exact_while_disabled=torch.equal(expected, logits(model)))
edited.revert()
results.fact(is_reverted=torch.equal(expected, logits(model)))
results.fact(planned_again=refusal(lambda: edit(model)))

# -- training, and what is saved of it ------------------------------------------------------------

for name, adapters in {
    "prompts": {"a": PROMPTS},
    "lora": {"a": LORA},
    "both": {"a": {"rules": [PROMPTS, LORA]}},
}.items():
    model = base()
    edited = edit(model, **adapters)
    shard(model)
    results.fact(**{f"losses {name}": mean(train(model, half()))})
    results.tensors(f"trained {name}", edited.tensors("a"))
    # Nothing of the base is kept whole, neither in a layer nor in the one it stands for.
    originals = [site.module for site in edited.swap_state.sites.values()]
    held = [p for found in originals for p in found.parameters()]
    results.fact(**{f"wholes {name}": [len(held), sum(not is_sharded(p) for p in held)]})
    Session().save(edited, folder / f"record {name}")
    if name == "both":
        continue
    Session().export(edited, "a", folder / f"export {name}")
adapted = shard_facade(facade(base()))
train(adapted, half())
adapted.save_pretrained(folder / "adapter")
results.tensors("facade", {"logits": logits(adapted)})

# -- loading --------------------------------------------------------------------------------------

model = base()
edited = edit(model, is_open=False)
shard(model)
stored = {key: torch.randn_like(t) for key, t in whole_tensors(edited.tensors("a")).items()}
for tensor in stored.values():
    dist.broadcast(tensor, 0)
edited.load_("a", stored)
loaded = whole_tensors(edited.tensors("a"))
results.fact(
    is_loaded=all(torch.equal(stored[key], loaded[key]) for key in stored),
    is_sharded_still=all(map(is_sharded, edited.tensors("a").values())),
    misfit=refusal(lambda: edited.load_("a", {key: t[:1] for key, t in stored.items()})),
)
results.tensors("stored", stored)
results.tensors("loaded", {"logits": logits(model)})
# Gathered parameters take storage that was used before, with the version it had.
for number in range(4):
    edited.load_("a", turned(stored, number))
    results.tensors(f"evaluation {number}", {"logits": logits(model)})
edited.load_("a", stored)
# The root's own parameters stay gathered after a pass without a backward: what is written then counts.
whole = base()
edited = edit(whole, is_open=False)
fully_shard(whole, mesh=mesh)
logits(whole)
edited.load_("a", stored)
results.tensors("loaded at the root", {"logits": logits(whole)})
results.fact(
    optimizer_has_parts=all(is_sharded(p) for p in (logits(whole), edited.added_parameters())[1])
)
adapted = shard_facade(facade(base()))
adapted.hotswap_adapter(folder / "adapter", "default", base_check="error")
results.tensors("hotswapped", {"logits": logits(adapted)})
# Another one, frozen, is whole in every process; trained, it would be each one's own.
adapted.load_adapter(folder / "adapter", "frozen", base_check="error")
adapted.set_adapter("frozen")
results.tensors("frozen", {"logits": logits(adapted)})
adapted.load_adapter(folder / "adapter", "trained", is_trainable=True)
results.fact(
    trained=refusal(lambda: adapted.set_adapter("trained")),
    composed=refusal(lambda: adapted.set_adapter({"default": 1.0, "frozen": 0.5})),
    active=adapted.active_adapter,
)
with adapted.activated(["default", "__base__"]):
    results.tensors("rows", {"logits": logits(adapted)})

# -- switching ------------------------------------------------------------------------------------

model = base()
edited = several(model)
shard(model)
first = logits(model)
for name in ("b", "d"):
    edited.set_active(name)
    results.tensors(name, {"logits": logits(model), **edited.tensors(name)})
edited.set_active("b")
results.fact(c=refusal(lambda: edited.set_active("c")), active_after=edited.active)
edited.set_active("a")
results.fact(is_back=torch.equal(first, logits(model)))
results.fact(sum=refusal(lambda: edited.set_active({"a": 1.0, "b": 1.0})))
# Several that are trained together are made one before the model is sharded.
model = base()
edited = edit(model, a=PROMPTS, b=LORA)
edited.set_active({"a": 1.0, "b": 0.5})
shard(model)
results.fact(losses_sum=mean(train(model, half())))
results.tensors("sum", {**edited.tensors("a"), **edited.tensors("b")})
results.fact(out_of_sum=refusal(lambda: edited.set_active("a")))

# -- mixed precision ------------------------------------------------------------------------------

model = base(torch.float32)
edited = edit(model)
shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
results.fact(
    losses_mixed=mean(train(model, half())),
    dtypes=sorted({str(t.dtype) for t in edited.tensors("a").values()}),
)
assert optimizer(model).param_groups
dist.destroy_process_group()
