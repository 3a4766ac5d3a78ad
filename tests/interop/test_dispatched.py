"""Over a base that accelerate dispatches, weights come and go with each call; the prompts stay, and count."""

import copy
import logging

import accelerate
import pytest
import torch
from support import families
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.attention import undispatched
from torch import nn
from transformers import AutoModelForCausalLM

from surgery_core import (
    ContractError,
    ModelRecipe,
    PreflightError,
    Session,
    StateError,
    diagnose,
    execution_device,
    verify,
)
from surgery_core.testing import assert_unchanged, snapshot

IDS = tokens(2, 7)
CPU = torch.device("cpu")
PROMPT = {
    "operation": "adaption_prompt",
    "options": {"adapter_len": 4, "adapter_layers": 2, "gate": "head"},
}
SHORT = {"operation": "adaption_prompt", "options": {"adapter_len": 2, "adapter_layers": 3}}
ADAPTERS = {"long": PROMPT, "short": SHORT}


@pytest.fixture(autouse=True)
def _quiet():
    """Accelerate remarks on every model that it offloads."""
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def device_map(model, *, disk=("1", "2")):
    """Return a map with a device for each layer and for what is around them."""
    stack = next(fqn for fqn, module in model.named_modules() if isinstance(module, nn.ModuleList))
    body, _, layers = stack.rpartition(".")
    names = [f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children()]
    names += [f"{body}.{n}" for n, _ in model.get_submodule(body).named_children() if n != layers]
    names += [name for name, _ in model.named_children() if name != body]
    return {name: "disk" if name.rpartition(".")[2] in disk else "cpu" for name in names}


def forced(model, _):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def partly_on_disk(model, folder):
    return accelerate.dispatch_model(model, device_map(model), offload_dir=folder / "offload")


def loaded(model, folder):
    """Return the model as users get it: loaded with a map."""
    model.save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model",
        device_map=device_map(model),
        offload_folder=folder / "offload",
        dtype=torch.float32,
    ).eval()


OFFLOADED = {
    "cpu_offload": lambda model, _: accelerate.cpu_offload(model, CPU),
    "cpu_offload buffers": lambda m, _: accelerate.cpu_offload(m, CPU, offload_buffers=True),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder / "offload", CPU),
    "dispatch_model disk": partly_on_disk,
    "from_pretrained disk": loaded,
}
"""Ways in which weights are on the meta device between calls."""

WAYS = {
    **OFFLOADED,
    "dispatch_model forced": forced,
    "cpu_offload_with_hook": lambda model, _: accelerate.cpu_offload_with_hook(model, CPU)[0],
}
HOOKED = ("dispatch_model disk", "from_pretrained disk", "dispatch_model forced")
"""Ways in which the attention modules have a forward of accelerate's too."""

every_way = pytest.mark.parametrize("way", WAYS)


def edit(model, *, active="long", adapters=ADAPTERS):
    """Return a model with adapters whose prompts and open gates are always the same."""
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": active})
    torch.manual_seed(3)
    edited = Session().plan_recipe(model, recipe).apply()
    for seed, name in enumerate(edited.adapters):
        open_gates_(edited.variant(name), seed=seed)
    return edited


def run(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def generate(model):
    return model.generate(IDS, max_new_tokens=6, do_sample=False)


def attentions(model):
    return [m for fqn, m in model.named_modules() if fqn.endswith(("self_attn", "attn"))]


@every_way
def test_forward_and_generation_are_those_of_the_same_model_not_dispatched(way, tmp_path):
    """Bit for bit: the same kernels run on the same values. Twice, since nothing may be kept wrongly."""
    plain = build()
    expected = edit(plain)
    model = WAYS[way](build(), tmp_path)

    edited = edit(model)

    assert (way in HOOKED) is all("forward" in vars(module) for module in attentions(model))
    assert 1e-2 < (run(build()) - run(plain)).abs().max()
    for name in ("long", "short", "long"):
        expected.set_active(name)
        edited.set_active(name)
        for _ in range(2):
            assert torch.equal(run(plain), run(model))
        assert torch.equal(generate(plain), generate(model))


@pytest.mark.parametrize("way", OFFLOADED)
def test_weights_really_are_elsewhere_and_prompts_are_not(way, tmp_path):
    model = OFFLOADED[way](build(), tmp_path)

    edited = edit(model)
    run(model)

    projection = model.get_submodule("model.layers.1.self_attn.k_proj").weight
    assert projection.is_meta
    assert ("disk" in way) is any(tmp_path.rglob("*/*.dat")) or "from_pretrained" in way
    assert {CPU} == {tensor.device for name in ADAPTERS for tensor in edited.tensors(name).values()}
    assert CPU == execution_device(model.get_submodule("model.layers.1.self_attn"))
    assert any("dispatched by accelerate" in found.subject for found in diagnose(model))


@every_way
def test_gradients_are_those_of_the_same_model_not_dispatched(way, tmp_path):
    plain, model = build(), WAYS[way](build(), tmp_path)
    expected, edited = edit(plain), edit(model)

    for each in (plain, model):
        each(IDS, use_cache=False).logits.logsumexp(-1).sum().backward()

    pairs = list(zip(expected.added_parameters(["long"]), edited.added_parameters(["long"])))  # noqa: B905 (compared next)
    assert 4 == len(pairs) == len(edited.added_parameters(["long"]))
    for old, new in pairs:
        assert new.grad.any()
        assert torch.equal(old.grad, new.grad)


@every_way
def test_revert_gives_the_same_modules_and_outputs(way, tmp_path):
    plain, model = build(), WAYS[way](build(), tmp_path)
    before = dict(model.named_modules())
    expected = run(model)
    assert torch.equal(run(plain), expected)
    edited = edit(model)
    assert not torch.equal(expected, run(model))

    assert model is edited.revert()

    assert before == dict(model.named_modules())
    assert torch.equal(expected, run(model))
    assert torch.equal(generate(plain), generate(model))


@every_way
def test_revert_gives_the_flags_back(way, tmp_path):
    model = WAYS[way](build(), tmp_path)
    expected = [parameter.requires_grad for parameter in model.parameters()]
    edited = edit(model)
    run(model)

    edited.revert()

    assert expected == [parameter.requires_grad for parameter in model.parameters()]


@every_way
def test_an_untrained_adapter_is_verified(way, tmp_path):
    model = WAYS[way](build(), tmp_path)
    session = Session()
    recipe = ModelRecipe.model_validate({"adapters": ADAPTERS, "active": "short"})
    edited = session.plan_recipe(model, recipe).apply()

    outcome = verify(
        edited, session.plugins.probe_inputs(model), tiers=("structure", "identity", "gradients")
    )

    assert {"ok"} == {check.status for check in outcome.checks}, outcome.render()
    assert 6 == len(outcome.checks)


@every_way
def test_that_it_can_be_reverted_is_verified(way, tmp_path):
    model = WAYS[way](build(), tmp_path)
    edited = edit(model)
    run(model)

    outcome = verify(edited, Session().plugins.probe_inputs(model), tiers=("revert",))

    assert {"ok"} == {check.status for check in outcome.checks}, outcome.render()


@every_way
def test_a_record_goes_from_one_way_to_the_other_and_back(way, tmp_path):
    session = Session()
    plain, model = build(), WAYS[way](build(), tmp_path)
    edited = edit(model)
    expected = run(model)

    session.save(edited, tmp_path / "from dispatched")
    edited.revert()
    again = session.load(plain, tmp_path / "from dispatched", base_check="error")
    assert torch.equal(expected, run(plain))
    session.save(again, tmp_path / "from plain")
    session.load(model, tmp_path / "from plain", base_check="error")

    assert torch.equal(expected, run(model))


@pytest.mark.parametrize("family", ["gemma3", "phi3", "gpt2", "qwen3"])
def test_other_families_are_dispatched_too(family, tmp_path):
    """Sliding windows, a fused projection, a Conv1D, and norms of queries."""
    make = families.gpt2 if family == "gpt2" else lambda: build(family)
    plain, model = make(), partly_on_disk(make(), tmp_path)
    edit(plain)

    edit(model)

    assert torch.equal(run(plain), run(model))
    assert torch.equal(generate(plain), generate(model))


@every_way
def test_the_class_for_peft_users_works_over_it(way, tmp_path):
    plain, model = build(), WAYS[way](build(), tmp_path)
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, gate="head")
    adapted = []
    for base in (plain, model):
        torch.manual_seed(3)
        adapted.append(AdaptionPromptModel(base, {"default": config}, "default"))
        open_gates_(adapted[-1].adapter_modules("default"))

    expected, actual = (run(each) for each in adapted)

    assert torch.equal(expected, actual)
    assert not torch.equal(run(build()), actual)
    adapted[1].unload()
    assert torch.equal(run(build()), run(model))


# -- attention modules with a forward of accelerate's ----------------------------------------------


def test_the_forward_of_a_wrapper_is_accelerates_around_its_own(tmp_path):
    """And the base keeps its own, so that it runs as before when it is back."""
    model = partly_on_disk(build(), tmp_path)
    base = model.model.layers[1].self_attn
    before = dict(vars(base))

    edited = edit(model)

    wrapper = model.model.layers[1].self_attn
    assert wrapper is edited.variant("long")["model.layers.1.self_attn"]
    assert before == vars(base)
    assert wrapper.forward.func is base.forward.func
    assert (wrapper,) == wrapper.forward.args
    assert wrapper._old_forward.__self__ is wrapper
    assert wrapper._hf_hook is base._hf_hook


def test_a_copy_of_the_model_computes_the_same(tmp_path):
    del tmp_path
    model = forced(build(), None)
    edit(model)

    again = copy.deepcopy(model)

    assert again.model.layers[1].self_attn.forward.args == (again.model.layers[1].self_attn,)
    assert torch.equal(run(model), run(again))


class Noting(accelerate.hooks.AlignDevicesHook):
    """Notes which module it is called for."""

    def __init__(self):
        super().__init__(CPU)
        self.seen = []

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(module)
        return super().pre_forward(module, *args, **kwargs)


Noting.__name__ = "AlignDevicesHook"


@pytest.mark.parametrize("is_chained", [True, False])
def test_hooks_are_called_for_the_wrapper(is_chained):
    model, first, last = build(), Noting(), Noting()
    base = model.model.layers[1].self_attn
    for hook in (first, last) if is_chained else (last,):
        accelerate.hooks.add_hook_to_module(base, hook, append=True)

    edit(model)
    run(model)

    wrapper = model.model.layers[1].self_attn
    assert wrapper is not base
    assert [wrapper] == last.seen
    assert first.seen == (last.seen if is_chained else [])


def patch(module):
    module.forward = lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)


def reload_own(module):
    module.register_parameter("sinks", nn.Parameter(torch.zeros(4)))
    accelerate.cpu_offload(module, CPU)


def hook(module):
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


@pytest.mark.parametrize("change", [patch, reload_own, hook])
def test_a_forward_that_would_bypass_the_adapter_is_refused(change):
    """Anybody else's, one that would ask accelerate's store for the prompt, and hooks we do not know."""
    model = build()
    change(model.model.layers[2].self_attn)
    before = snapshot(model)

    with pytest.raises(ContractError) as caught:
        edit(model)

    assert undispatched(model.model.layers[2].self_attn) is model.model.layers[2].self_attn
    assert (
        "Operation 'adaption_prompt' cannot work at 'model.layers.2.self_attn': expected a module "
        "with its class's own forward, got LlamaAttention with a patched forward. Remove what "
        "patched it (accelerate's dispatch hooks, for example) first."
    ) == str(caught.value)
    assert_unchanged(before, model, subject="A refusal")


def test_layers_that_are_loaded_whole_are_refused():
    model = accelerate.cpu_offload(build(), CPU, preload_module_classes=["LlamaDecoderLayer"])
    expected = run(build())

    with pytest.raises(PreflightError) as caught:
        edit(model)

    assert (
        "Model cannot be worked on: 3 modules loaded whole by accelerate at 'model.layers.0': each "
        "call looks up the tensors inside by name, and finds none that was added. Dispatch without "
        "`preload_module_classes`."
    ) == str(caught.value)
    assert torch.equal(expected, run(model))


def test_hooks_that_are_removed_meanwhile_leave_the_adapter(tmp_path):
    """Then the weights are where they were before, and the model is a plain one."""
    plain, model = build(), partly_on_disk(build(), tmp_path)
    edit(plain)
    edited = edit(model)

    accelerate.hooks.remove_hook_from_submodules(model)

    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(run(plain), run(model))
    edited.revert()
    assert torch.equal(run(build()), run(model))


def test_a_model_dispatched_after_it_was_adapted_computes_the_same(tmp_path):
    """Its prompts are offloaded too, so that they can be neither trained nor saved."""
    plain, model = build(), build()
    edit(plain)
    edited = edit(model)

    partly_on_disk(model, tmp_path)

    assert torch.equal(run(plain), run(model))
    assert torch.equal(generate(plain), generate(model))
    with pytest.raises(StateError, match=r"^Nothing was saved: expected values that are finite"):
        Session().save(edited, tmp_path / "record")
    edited.revert()
    assert torch.equal(run(build()), run(model))


@every_way
def test_several_adapters_at_once_compute_the_same(way, tmp_path):
    plain, model = build(), WAYS[way](build(), tmp_path)
    expected = run(model)
    weights = {"long": 0.5, "short": 0.5}
    edit(plain, active=weights)

    edited = edit(model, active=weights)

    assert torch.equal(run(plain), run(model))
    edited.revert()
    assert torch.equal(expected, run(model))


def test_a_copy_that_could_not_be_trained_is_refused():
    """Its weights would be those of the base again with each call."""
    model = accelerate.cpu_offload(build(), CPU)
    copies = {"operation": "trainable_copy", "options": {"modules": ["lm_head"]}}

    with pytest.raises(ContractError):
        Session().plan_recipe(model, ModelRecipe.model_validate({"rules": [copies]}))
