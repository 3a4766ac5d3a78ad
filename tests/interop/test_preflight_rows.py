"""What models may be wrapped in or made of, with real ones: PEFT's, quantised, compiled, without values."""

from importlib import import_module

import peft
import pytest
import torch
import torch.distributed as dist
from interop.test_quantised_bases import BITSANDBYTES, SHAPE, SKIPPED, linears, torchao_config
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from surgery_core import ModelRecipe, PreflightError, Session, diagnose, read_record, verify
from surgery_core.testing import assert_unchanged, snapshot

IDS = tokens(2, 7)
CONFIG = {"adapter_len": 4, "adapter_layers": 2, "gate": "head"}
RECIPE = ModelRecipe.model_validate(
    {"adapters": {"a": {"operation": "adaption_prompt", "options": CONFIG}}}
)
LORA = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}

noisy = pytest.mark.filterwarnings("ignore")
"""For libraries that warn about torch, and about kernels they do not have."""


def edit(model, *, recipe=RECIPE, is_open=True):
    """Return a model with an adapter whose prompts and open gates are always the same."""
    torch.manual_seed(3)
    edited = Session().plan_recipe(model, recipe).apply()
    if is_open:
        open_gates_(edited.variant("a"))
    return edited


def run(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def verified(edited, **options):
    """Return the outcomes of all checks by tier, with the plugin's own inputs."""
    inputs = Session().plugins.probe_inputs(edited.model)
    return [(check.tier, check.status) for check in verify(edited, inputs, **options).checks]


ALL_OK = [(tier, "ok") for tier in ("structure", "identity", "revert", "revert", "gradients")]


# -- wrapped for several processes, or compiled ---------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    """Be the only process of a group."""
    where = f"file://{tmp_path / 'init'}"
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_cpu(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "FSDPModule": on_cpu,
    "OptimizedModule": torch.compile,
}


# torch.compile uses torch.jit, which is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_class_for_peft_users_refuses_what_a_session_refuses(kind):
    """Otherwise prompts would be trained that nobody synchronises."""
    model = WRAPPERS[kind](build())
    before = snapshot(model)

    with pytest.raises(PreflightError, match=rf"^Model cannot be worked on: {kind} at the root: "):
        AdaptionPromptModel(model, {"default": AdaptionPromptConfig(**CONFIG)}, "default")
    with pytest.raises(PreflightError, match=rf"^Model cannot be worked on: {kind} at the root: "):
        edit(model)

    assert_unchanged(before, model, subject="A refusal")


def gradients(model, edited):
    model(IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    return [parameter.grad for parameter in edited.added_parameters()]


@pytest.mark.usefixtures("process_group")
def test_what_a_refusal_advises_works_for_data_parallel_models():
    """Planned for the `module`, and wrapped again."""
    plain, wrapped = build(), DistributedDataParallel(build())
    expected = edit(plain)

    edited = edit(wrapped.module)
    again = DistributedDataParallel(wrapped.module)

    assert torch.equal(run(plain), run(again))
    pairs = zip(gradients(plain, expected), gradients(again, edited), strict=True)
    assert all(old.any() and torch.equal(old, new) for old, new in pairs)


@pytest.mark.usefixtures("process_group")
def test_what_a_refusal_advises_works_for_sharded_models():
    """Applied before `fully_shard`: the prompts are sharded as everything is."""
    plain, model = build(), build()
    expected, edited = edit(plain), edit(model)
    old = gradients(plain, expected)

    for layer in model.model.layers:
        on_cpu(layer)
    on_cpu(model)

    assert torch.equal(run(plain), run(model))
    model(IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    new = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if "adaption_" in name
    }
    assert 4 == len(old) == len(new)
    assert all(any(torch.equal(grad, other) for other in new.values()) for grad in old)
    assert edited.is_applied


# -- PEFT -----------------------------------------------------------------------------------------


def with_lora():
    """Return a model that PEFT has wrapped, LoRA on every projection, always with the same values."""
    torch.manual_seed(5)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return peft.get_peft_model(build(), peft.LoraConfig(**LORA, target_modules=targets)).eval()


peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.peft
@peft_warns
def test_a_model_that_peft_wraps_computes_what_the_base_inside_does():
    """Prompts beside LoRA, put there through the wrapper or below it."""
    model, below = with_lora(), with_lora()
    lora = run(model)

    edited, expected = edit(model), edit(below.get_base_model())

    fqns = [edit.fqn for edit in edited.plan.document.adapters["a"].edits]
    assert [f"base_model.model.model.layers.{i}.self_attn" for i in (1, 2)] == fqns
    assert torch.equal(run(below), run(model))
    assert torch.equal(run(below.get_base_model()), run(model))
    with model.disable_adapter(), below.disable_adapter():
        assert torch.equal(run(below), run(model))
        assert not torch.equal(run(build()), run(model))
    assert 1e-2 < (lora - run(model)).abs().max()
    pairs = zip(gradients(below, expected), gradients(model, edited), strict=True)
    assert all(old.any() and torch.equal(old, new) for old, new in pairs)


@pytest.mark.peft
@peft_warns
def test_revert_gives_a_model_that_peft_wraps_back_as_it_was():
    """Its LoRA is trained again afterwards, as before."""
    model = with_lora()
    expected, before = run(model), snapshot(model)
    flags = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    edited = edit(model)
    run(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    edited.revert()

    assert all("lora_" in name for name in flags)
    assert all("adaption_" in name for name in trained)
    assert_unchanged(before, model, subject="Apply and revert")
    assert torch.equal(expected, run(model))


@pytest.mark.peft
@peft_warns
def test_a_model_that_peft_wraps_is_verified_and_recorded(tmp_path):
    """A record of it suits the base inside, too, if the rules are matched anew."""
    session, model, below = Session(), with_lora(), with_lora().get_base_model()
    edited = edit(model, is_open=False)
    assert ALL_OK == verified(edited)
    open_gates_(edited.variant("a"))
    expected = run(model)

    session.save(edited, tmp_path)
    edited.revert()
    session.load(model, tmp_path, base_check="error")
    session.load(below, tmp_path, on_other_model="rematch")

    assert torch.equal(expected, run(model))
    assert torch.equal(expected, run(below))


# -- quantised ------------------------------------------------------------------------------------


def with_torchao(_):
    model = build("llama", SHAPE)
    chosen = set(linears(model))
    quantize_ = import_module("torchao.quantization").quantize_
    quantize_(model, torchao_config("int8"), filter_fn=lambda _, fqn: fqn in chosen)
    return model


def with_quanto(_):
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    model = build("llama", SHAPE)
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    return model


def with_bitsandbytes(folder):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    build("llama", SHAPE).save_pretrained(folder)
    config = BitsAndBytesConfig(**BITSANDBYTES["8bit"][1], llm_int8_skip_modules=SKIPPED)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()


QUANTISED = {"torchao": with_torchao, "quanto": with_quanto, "bitsandbytes": with_bitsandbytes}


@noisy
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_gets_the_adapter_of_a_recipe(kind, tmp_path):
    """The same as by `AdaptionPromptModel`, which is held to the formula elsewhere; and reverted."""
    model = QUANTISED[kind](tmp_path / "model")
    base = run(model)
    assert not torch.equal(run(build("llama", SHAPE)), base)
    torch.manual_seed(3)
    adapted = AdaptionPromptModel(model, {"a": AdaptionPromptConfig(**CONFIG)}, "a")
    open_gates_(adapted.adapter_modules("a"))
    expected = run(adapted)
    adapted.unload()
    modules = dict(model.named_modules())

    edited = edit(model)

    assert [] == [found for found in diagnose(model) if found.level == "error"]
    assert torch.equal(expected, run(model))
    assert {torch.float32} == {parameter.dtype for parameter in edited.added_parameters()}
    assert all(grad.any() and grad.isfinite().all() for grad in gradients(model, edited))
    assert model is edited.revert()
    assert modules == dict(model.named_modules())
    assert torch.equal(base, run(model))


every_kind = pytest.mark.parametrize("kind", QUANTISED)


@noisy
@every_kind
def test_a_quantised_base_is_verified(kind, tmp_path):
    model = QUANTISED[kind](tmp_path / "model")

    assert ALL_OK == verified(edit(model, is_open=False))


@noisy
@every_kind
def test_a_record_has_nothing_of_a_quantised_base_and_is_replayed(kind, tmp_path):
    model = QUANTISED[kind](tmp_path / "model")
    edited = edit(model)
    expected = run(model)

    Session().save(edited, tmp_path / "record")
    edited.revert()

    names = {key.rpartition(".")[2] for key in read_record(tmp_path / "record").state["a"]}
    assert {"adaption_prompt", "adaption_gate"} == names
    Session().load(model, tmp_path / "record", base_check="error")
    assert torch.equal(expected, run(model))


# -- compiled in place ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "model",
        "model.layers.{}",
        "model.layers.{}.self_attn",
        "model.layers.{}.self_attn.k_proj",
    ],
)
def test_what_was_compiled_in_place_does_not_bypass_the_adapter(pattern):
    """Wherever: what ran before the adapter came, with it, and without it again."""
    torch.compiler.reset()
    plain, model = build(), build()
    for fqn in {pattern.format(i) for i in range(3)}:
        model.get_submodule(fqn).compile(backend="eager")
    base = run(model)
    assert torch.equal(run(plain), base)
    edit(plain)

    edited = edit(model)

    assert torch.equal(run(plain), run(model))
    assert not torch.equal(base, run(model))
    edited.revert()
    assert torch.equal(base, run(model))
    assert ["note"] == [found.level for found in diagnose(model)]


def test_the_class_for_peft_users_does_not_let_compiled_attention_bypass_the_adapter():
    model = build()
    for layer in model.model.layers:
        layer.self_attn.compile(backend="eager")
    base = run(model)

    adapted = AdaptionPromptModel(model, {"a": AdaptionPromptConfig(**CONFIG)}, "a")

    assert torch.equal(base, run(adapted))
    open_gates_(adapted.adapter_modules("a"))
    assert not torch.equal(base, run(adapted))
    with adapted.disable_adapter():
        assert torch.equal(base, run(adapted))
    assert all(layer.self_attn._compiled_call_impl for layer in adapted.unload().model.layers)


# -- without values -------------------------------------------------------------------------------


def test_a_model_without_values_is_planned_and_changed_like_one_with_values(tmp_path):
    """What is added has none either; checks that would run the model are skipped."""
    session = Session()
    build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    real = session.plugins.load_model(str(tmp_path))
    model = session.plugins.load_skeleton(str(tmp_path))
    modules, keys = dict(model.named_modules()), list(model.state_dict())

    plan = session.plan_recipe(model, RECIPE)
    edited = plan.apply()

    assert session.plan_recipe(real, RECIPE).document == plan.document
    assert ["note"] == [found.level for found in session.plugins.preflight(model)]
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert 4 == len(edited.tensors("a"))
    assert session.plugins.probe_inputs(model) is None
    assert [
        *(("structure", "ok"), ("identity", "skipped")),
        *(("revert", "ok"), ("gradients", "skipped")),
    ] == verified(edited)
    assert model is edited.revert()
    assert modules == dict(model.named_modules())
    assert keys == list(model.state_dict())
