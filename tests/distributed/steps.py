"""What one process does with everything, or several do together: the same tiny model, adapter and training."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.families import Shape, build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

from surgery_core import ModelRecipe, Session, whole_tensors

OPTIONS = {"adapter_len": 3, "adapter_layers": 2, "gate": "head"}
PROMPTS = {"operation": "adaption_prompt", "options": OPTIONS}
LORA = {
    "operation": "low_rank",
    "options": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
}
IDS = tokens(4, 9)
"""A batch, of which each of two processes has half."""
FEATURES = torch.sin(torch.arange(20.0)).view(4, 5)
"""For conditioned adapters, of each row; others do not look at them."""
STEPS = 3


def base(dtype=torch.float64):
    """Return the model; four query heads, two for keys and values."""
    return build("llama", Shape(layers=3), dtype=dtype)


def recipe(**adapters):
    return ModelRecipe.model_validate({"adapters": adapters, "active": next(iter(adapters))})


def edit(model, *, seed=0, is_open=True, **adapters):
    """Apply adapters, the first of them active and with open gates that differ from head to head."""
    torch.manual_seed(seed)
    edited = Session().plan_recipe(model, recipe(**(adapters or {"a": PROMPTS}))).apply()
    if is_open:
        open_(edited)
    return edited


def several(model):
    """Apply four adapters, open: `a` and `c` to be trained, `b` and `d` frozen; `a` is active."""
    frozen = [
        {**one, "options": {**one["options"], "inference_mode": True}} for one in (PROMPTS, LORA)
    ]
    torch.manual_seed(0)
    plan = recipe(a=PROMPTS, b=frozen[0], c=PROMPTS, d=frozen[1])
    edited = Session().plan_recipe(model, plan).apply()
    for name in ("b", "c", "d", "a"):
        edited.set_active(name)
        open_(edited)
    return edited


def turned(state, number):
    """Return an adapter's tensors with gates that have another sign and size for each number."""
    factor = (-1) ** number * (1 + number)
    return {key: t * factor if "gate" in key else t.clone() for key, t in state.items()}


def open_(edited):
    """Give the active adapter values that are not its first, the same wherever it is done."""
    open_gates_(prompts(edited.variant(edited.active)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in edited.tensors(edited.active).items():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)


def prompts(modules):
    return {
        fqn: module
        for fqn, module in modules.items()
        if "adaption_gate" in vars(module)["_parameters"]
    }


def facade(model, *, seed=0, **fields):
    """Put an adapter on a model by the class for PEFT's users."""
    torch.manual_seed(seed)
    config = AdaptionPromptConfig(**{**OPTIONS, **fields})
    adapted = AdaptionPromptModel(model, {"default": config}, "default")
    open_gates_(adapted.adapter_modules("default"))
    return adapted


def optimizer(module):
    """Return one with groups of their own for gates and everything else."""
    named = [found for found in module.named_parameters() if found[1].requires_grad]
    gates = [parameter for name, parameter in named if name.endswith("adaption_gate")]
    others = [parameter for name, parameter in named if not name.endswith("adaption_gate")]
    groups = [{"params": others, "lr": 0.02}, *([{"params": gates, "lr": 0.1}] if gates else [])]
    # So that gradients of rounding size do not decide about steps of full size.
    return torch.optim.AdamW(groups, eps=1e-4)


def train(module, ids=IDS, steps=STEPS):
    """Return the loss of each step."""
    losses, steps_of = [], optimizer(module)
    for _ in range(steps):
        loss = module(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        steps_of.step()
        steps_of.zero_grad()
        losses.append(loss.item())
    return losses


def logits(module, ids=IDS):
    with torch.no_grad():
        found = module(ids, use_cache=False).logits
    return found.detach()


def half(ids=IDS):
    """Return the rows of this process."""
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def mean(losses):
    """Return the mean over the processes of each loss."""
    found = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(found)
    return (found / dist.get_world_size()).tolist()


class Results:
    """What a process hands to the test: facts as JSON, and tensors."""

    def __init__(self, folder):
        self._facts, self._tensors = {}, {}
        self._stem = Path(folder) / f"rank{dist.get_rank()}"

    def fact(self, **facts):
        """Keep facts by name, and on disk, so that those before a failure are seen."""
        self._facts |= facts
        self._stem.with_suffix(".json").write_text(json.dumps(self._facts))

    def tensors(self, name, tensors):
        """Keep tensors, whole."""
        whole = whole_tensors(tensors)
        self._tensors |= {
            f"{name}:{key}": t.detach().clone().contiguous() for key, t in whole.items()
        }
        save_file(self._tensors, self._stem.with_suffix(".safetensors"))


def refusal(function):
    """Return what kept a function from doing something, as class and message; None if nothing did."""
    try:
        function()
    except Exception as err:  # noqa: BLE001 (whatever it is, the test compares it)
        return [type(err).__name__, str(err)]
    return None
