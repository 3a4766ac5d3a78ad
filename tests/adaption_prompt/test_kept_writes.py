"""Writes of every kind, also those that PyTorch does not count, are seen by the next pass."""

import gc
import mmap

import peft
import pytest
import torch
from support.adapted import relative_error
from support.families import build, open_gates_
from support.kept import IDS, KEYS, LAYER, TOLERANCE, check, logits, make, top
from torch import nn

from surgery_core import ModelRecipe, Session

# -- writes ---------------------------------------------------------------------------------------


def prompt_of(model):
    return top(model).adaption_prompt


def train(model, optimizer, **options):
    """Train with a pass without gradients between forward and backward, without leaving eval mode."""
    optimizer = optimizer(model.adapter_parameters(["a"]), lr=0.3, **options)
    loss = model(IDS, labels=IDS).loss
    logits(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train_8bit(model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    train(model, bitsandbytes.optim.AdamW8bit, min_8bit_size=1)


def train_in_backward(model):
    for parameter in model.adapter_parameters(["a"]):
        optimizer = torch.optim.SGD([parameter], lr=0.3, fused=True)

        def step(parameter, optimizer=optimizer):
            optimizer.step()
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(step)
    model(IDS, labels=IDS).loss.backward()


def swap_averages(model):
    """As evaluation with averaged weights does: their storage comes, and goes again."""
    averages = [p.detach() * 1.5 for p in model.adapter_parameters(["a"])]
    for parameter, average in zip(model.adapter_parameters(["a"]), averages, strict=True):
        parameter.data = average
    logits(model)
    for parameter, average in zip(model.adapter_parameters(["a"]), averages, strict=True):
        parameter.data = average * 2


def write_in_another_process(model):
    tensor = prompt_of(model).data.share_memory_()
    process = torch.multiprocessing.get_context("fork").Process(target=tensor.mul_, args=(3,))
    process.start()
    process.join()


def overwrite_file(model, tmp_path):
    """Map the values projection from a file, and write to the file."""
    weight = top(model).v_proj.weight
    path = tmp_path / "weight"
    path.write_bytes(weight.detach().numpy().tobytes())
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        weight.data = torch.frombuffer(mapped, dtype=weight.dtype).view(weight.shape)
        logits(model)
        file.write((weight.detach().numpy() * 2).tobytes())


WRITES = {
    "data": lambda m: prompt_of(m).data.mul_(3),
    "data of the base": lambda m: top(m).k_proj.weight.data.mul_(3),
    "numpy": lambda m: prompt_of(m).detach().numpy().__imul__(3),
    "dlpack": lambda m: torch.from_dlpack(prompt_of(m).detach()).mul_(3),
    "set_": torch.no_grad()(lambda m: prompt_of(m).set_(torch.randn(1, 3, 24))),
    "storage": lambda m: (
        top(m)
        .adaption_gate.untyped_storage()
        .copy_(torch.tensor([3.0, 1.0, -2.0, 1.0]).untyped_storage())
    ),
    "swap_tensors": lambda m: torch.utils.swap_tensors(
        prompt_of(m), nn.Parameter(torch.randn(1, 3, 24))
    ),
    "load_state_dict": lambda m: m.load_state_dict(
        {k: t * 1.5 if t.is_floating_point() else t for k, t in m.state_dict().items()}, assign=True
    ),
    "fused AdamW": lambda m: train(m, torch.optim.AdamW, fused=True),
    "AdamW in 8 bits": train_8bit,
    "optimizer in backward": train_in_backward,
    "averages": swap_averages,
    "another process": write_in_another_process,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_of_every_kind_are_seen_by_the_next_pass(write):
    model = make()
    before = check(model)
    gc.disable()
    try:
        write(model)
        after = check(model)
    finally:
        gc.enable()

    assert relative_error(before, after) > 100 * TOLERANCE


def test_a_file_overwritten_under_a_mapped_base_is_seen(tmp_path):
    model = make()
    before = check(model)

    overwrite_file(model, tmp_path)

    assert relative_error(before, check(model)) > 100 * TOLERANCE


class Doubled(nn.Linear):
    """A linear layer of twice its weight."""

    def forward(self, x):
        """Return twice what the layer gave."""
        return 2 * super().forward(x)


def patch_forward(model):
    linear = top(model).k_proj
    linear.forward = lambda hidden: 2 * nn.Linear.forward(linear, hidden)


MODULES = {
    "class": lambda m: setattr(top(m).k_proj, "__class__", Doubled),
    "forward": patch_forward,
    "hook": lambda m: top(m).k_proj.register_forward_hook(lambda *a: 2 * a[2]),
    "pre-hook": lambda m: top(m).k_proj.register_forward_pre_hook(lambda _, a: (2 * a[0],)),
}


@pytest.mark.parametrize("change", MODULES.values(), ids=MODULES)
def test_projections_that_compute_otherwise_are_seen_by_the_next_pass(change):
    model = make()
    before = check(model)

    change(model)

    assert relative_error(before, check(model, changed=[KEYS])) > 100 * TOLERANCE


def merge_peft(base):
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).merge_and_unload()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("state", ["active", "other", "disabled", "composed", "merged beside"])
def test_lora_merged_by_peft_is_seen_whatever_was_active(state):
    model = make()
    before = check(model)
    base = model.get_base_model()
    if state == "disabled":
        with model.disable_adapter():
            merge_peft(base)
    else:
        model.set_adapter({"other": "b", "composed": {"a": 0.5, "b": 1.0}}.get(state, "a"))
        merge_peft(base)
        model.set_adapter("a")

    assert relative_error(before, check(model)) > 100 * TOLERANCE


def edited(base):
    options = {"adapter_len": 3, "adapter_layers": 2, "gate": "head"}
    adapters = {name: {"operation": "adaption_prompt", "options": options} for name in "ab"}
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": "a"})
    found = Session().plan_recipe(base, recipe).apply()
    for seed, name in enumerate("ab"):
        open_gates_(found.variant(name), seed=seed)
    return found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("state", ["disabled", "paused", "other"])
def test_writes_to_the_base_of_a_recipe_are_seen(state):
    found = edited(build(seed=1))
    base = found.model

    class Facade:
        """What the checks ask for."""

        get_base_model = staticmethod(lambda: base)
        adapter_modules = staticmethod(found.variant)
        __call__ = staticmethod(base)

    model = Facade()
    before = check(model)
    with {"disabled": found.disabled, "paused": found.paused}.get(state, found.paused)():
        merge_peft(base)
        base.get_submodule(LAYER).v_proj.weight.data.mul_(2)
    if state == "other":
        found.set_active("b")
        logits(model)
        found.set_active("a")

    assert relative_error(before, check(model)) > 100 * TOLERANCE
