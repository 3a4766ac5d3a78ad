"""What a model is wrapped in or placed by is found before anything is written, and said with a way out."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from core.edits import recipe
from core.toys import Gate, Gated, Net, Shift, ToyPlugin, example, session
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surgery_core import (
    ContractError,
    Diagnostic,
    OfClass,
    PluginError,
    PreflightError,
    Rule,
    Session,
    SurgeryError,
    check_preflight,
    diagnose,
    execution_device,
    hookimpl,
)
from surgery_core.testing import assert_unchanged, snapshot

GATE = [Rule(operation="gate", options={"value": 0.5})]

# Of torch.jit, which torch.compile uses too.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def stand_in(name, package):
    """Return a class as a package that is not installed has it."""
    return type(name, (Wrapper,), {"__module__": package})


ENGINE = stand_in("DeepSpeedEngine", "deepspeed.runtime.engine")


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


# -- refused --------------------------------------------------------------------------------------

NOTED = "it has noted which parameters there are."
REFUSED = {
    "DistributedDataParallel": (
        DistributedDataParallel,
        f"{NOTED} Plan for its `module`, and wrap it afterwards.",
    ),
    "DDP": (replicate, f"{NOTED} Apply before `replicate`."),
    "DataParallel": (
        nn.DataParallel,
        "it copies the model at each call. Plan for its `module`, and wrap it afterwards.",
    ),
    "FullyShardedDataParallel": (
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        "its parameters are flattened and sharded. Apply first, and use `fully_shard` instead.",
    ),
    "FSDPModule": (on_cpu, "its parameters are sharded. Apply before `fully_shard`."),
    "OptimizedModule": (
        torch.compile,
        "it is a compiled view of another module. Plan for its `_orig_mod`, and compile it "
        "afterwards, or use `model.compile()`.",
    ),
    "ScriptModule": (
        torch.jit.script,
        "its code is fixed. Plan for the module it was scripted from.",
    ),
    "DeepSpeedEngine": (ENGINE, f"{NOTED} Apply before `deepspeed.initialize`."),
    "PipelineModule": (
        stand_in("PipelineModule", "deepspeed.runtime.pipe.module"),
        "its layers are spread over processes. Apply to the layers it is made from.",
    ),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``:UserWarning")
@pytest.mark.parametrize("place", ["", "policy"])
@pytest.mark.parametrize("kind", REFUSED)
def test_wrapped_models_are_refused_and_left_alone(kind, place):
    """At the root or inside another module, by rules and by recipes."""
    wrap, message = REFUSED[kind]
    model = wrap(Net().eval())
    model = nn.ModuleDict({place: model}) if place else model
    # FSDP prepares itself when its state is first asked for.
    snapshot(model)
    before = snapshot(model)
    where = f"at {place!r}" if place else "at the root"

    for plan in (
        lambda: session().plan(model, GATE),
        lambda: session().plan_recipe(model, recipe()),
    ):
        with pytest.raises(PreflightError) as caught:
            plan()
        assert f"Model cannot be worked on: {kind} {where}: {message}" == str(caught.value)
        assert ("error", kind, place, message) == tuple(
            getattr(caught.value.diagnostics[0], name)
            for name in ("level", "subject", "fqn", "message")
        )
        assert 1 == len(caught.value.diagnostics)

    assert_unchanged(before, model, subject="A refusal")


def test_all_that_is_refused_is_named():
    model = nn.ModuleList([nn.DataParallel(Net()), ENGINE(Net()), torch.compile(Net())])

    with pytest.raises(PreflightError, match=r"^Model cannot be worked on: DataP") as caught:
        session().plan(model, GATE)

    assert ["0", "1", "2"] == [found.fqn for found in caught.value.diagnostics]
    assert isinstance(caught.value, SurgeryError)
    assert all(str(found) in str(caught.value) for found in caught.value.diagnostics)


def test_a_class_that_derives_from_a_refused_one_is_refused():
    derived = type("PipelineEngine", (ENGINE,), {"__module__": "somewhere.else"})

    with pytest.raises(PreflightError, match=r"DeepSpeedEngine at the root: it has noted"):
        session().plan(derived(Net()), GATE)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("PeftModel", "peft_of_mine.models"),
        ("PeftModel", "mine.peft"),
        ("DeepSpeedEngine", "deepspeed_like"),
        ("DistributedDataParallel", "mine.torch.nn.parallel"),
        ("DDP", "torch.distributed"),
    ],
)
def test_a_class_that_is_only_called_like_one_is_not_refused(name, package):
    model = stand_in(name, package)(Net())

    assert [] == diagnose(model)
    assert 8 == len(session().plan(model, GATE).document.edits)


# -- allowed --------------------------------------------------------------------------------------


def test_a_model_that_peft_wraps_is_allowed_with_a_note():
    base = stand_in("PeftModel", "peft.peft_model")
    model = type("PeftModelForCausalLM", (base,), {"__module__": "peft.peft_model"})(Net().eval())
    before, expected = snapshot(model), model(example())

    surgery = session().plan(model, GATE).apply()

    assert [
        "PeftModel at the root: FQNs begin with those of its wrappers. Its own adapters stay as "
        "they are."
    ] == [str(found) for found in diagnose(model)]
    assert "module.layers.0.up" in [edit.fqn for edit in surgery.plan.document.edits]
    assert not torch.equal(expected, model(example()))
    surgery.revert()
    assert_unchanged(before, model, subject="Apply and revert")


def outputs(model):
    """Return outputs with the rules applied, and after the revert."""
    surgery = session().plan(model, GATE).apply()
    with torch.no_grad():
        applied = model(example())
        surgery.revert()
        return applied, model(example())


@pytest.mark.parametrize("names", [[""], ["layers.0", "layers.2"], ["layers.1.up", "head"]])
def test_a_model_compiled_in_place_is_allowed(names):
    """Compiled code that has run already computes the right thing, applied and reverted."""
    torch.compiler.reset()
    plain, model = Net().eval(), Net().eval()
    model.load_state_dict(plain.state_dict())
    for name in names:
        model.get_submodule(name).compile(backend="eager")
    with torch.no_grad():
        before = model(example())
    expected = outputs(plain)
    modules = "1 module" if len(names) == 1 else f"{len(names)} modules"
    where = f"at {names[0]!r}" if names[0] else "at the root"

    found = [str(diagnostic) for diagnostic in diagnose(model)]
    actual = outputs(model)

    assert all(torch.equal(old, new) for old, new in zip(expected, actual, strict=True))
    assert torch.equal(before, actual[1])
    assert not torch.equal(*actual)
    assert [
        f"{modules} compiled in place {where}: what replaces one of them is not compiled. Call its "
        "`compile()` where that matters."
    ] == found


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations return and that are somewhere."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        result = func(*args, **(kwargs or {}))
        self.num_bytes += sum(
            leaf.nbytes
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta
        )
        return result


class ShiftInPlace(Shift):
    """Puts the shift where the weight is."""

    def build(self, site, options):
        with site.module.weight.device:
            return super().build(site, options)


def test_a_model_without_values_is_allowed_with_a_note_and_allocates_none():
    asked = session(ShiftInPlace())
    with torch.device("meta"):
        model = Net()
    before = snapshot(model)

    with Allocations() as allocations:
        surgery = asked.plan(model, [Rule(operation="shift")]).apply()
        added = [item.module.shift for item in surgery.replacements]
        surgery.revert()

    assert 0 == allocations.num_bytes
    assert 8 == len(added)
    assert all(shift.is_meta for shift in added)
    assert_unchanged(before, model, subject="Apply and revert")
    assert [
        "11 modules on the meta device at 'stem': there are no values to compute with. Load them "
        "before running the model."
    ] == [str(found) for found in diagnose(model)]
    with Allocations() as counted:
        torch.zeros(3)
    assert 12 == counted.num_bytes


def test_a_plain_model_gives_no_diagnostics():
    model = Net()

    assert [] == session().plugins.preflight(model)
    check_preflight([])


# -- dispatched by accelerate ---------------------------------------------------------------------


def hook(device, **attributes):
    return SimpleNamespace(execution_device=device, **attributes)


def test_a_module_computes_where_its_hook_says():
    """Its own, one chained with others, or that of a module inside."""
    alone, chained, outer, plain = nn.Linear(1, 1), nn.Linear(1, 1), Net(), Net()
    alone._hf_hook = hook(torch.device("cpu"))
    chained._hf_hook = SimpleNamespace(hooks=(hook(None), hook("meta"), hook("cpu")))
    outer.layers[1]._hf_hook = hook("cpu")
    outer._hf_hook = hook(None)

    assert torch.device("cpu") == execution_device(alone)
    assert torch.device("meta") == execution_device(chained)
    assert torch.device("cpu") == execution_device(outer)
    assert execution_device(plain) is None
    assert execution_device(outer.layers[0]) is None


def test_a_dispatched_model_is_allowed_with_a_note():
    model = Net()
    model.head._hf_hook = hook("cpu", offload=True, place_submodules=False)
    model.head.to("meta")

    assert [
        "1 module dispatched by accelerate at 'head': weights may come and go with each call. What "
        "is added stays where they compute."
    ] == [str(found) for found in diagnose(model)]


def test_modules_that_are_loaded_whole_are_refused():
    """A parameter that is added inside would be asked of those that accelerate keeps."""
    model = Net()
    model.layers[1]._hf_hook = hook("cpu", offload=True, place_submodules=True)
    model.layers[2]._hf_hook = hook("cpu", offload=False, place_submodules=True)

    with pytest.raises(PreflightError) as caught:
        session().plan(model, GATE)

    assert (
        "Model cannot be worked on: 1 module loaded whole by accelerate at 'layers.1': each call "
        "looks up the tensors inside by name, and finds none that was added. Dispatch without "
        "`preload_module_classes`."
    ) == str(caught.value)


class GateWhereItComputes(Gate):
    """Puts the gate where the module computes, or elsewhere than its weights."""

    def build(self, site, options):
        wrapper = Gated(site.module, gate=options.get("value", 0.0))
        wrapper.gate = nn.Parameter(torch.zeros(1, device=execution_device(site.module) or "cpu"))
        return wrapper


def test_what_is_added_may_be_where_a_module_computes_and_nowhere_else():
    model = Net()
    model.head.to("meta")
    plan = session(GateWhereItComputes()).plan(model, [Rule(operation="gate", select="head")])
    with pytest.raises(
        ContractError, match=r"another device at 'head': expected 'meta', got 'cpu'"
    ):
        plan.apply()

    model.head._hf_hook = hook("cpu")
    surgery = plan.apply()

    assert ("cpu",) == surgery.replacements[0].carry_over.devices


# -- plugins --------------------------------------------------------------------------------------


class Careful:
    """A plugin that looks at models."""

    def __init__(self, *answers, error=None):
        self.answers, self.error = answers, error
        self.asked = []

    @hookimpl
    def surgery_preflight(self, model):
        self.asked.append(model)
        yield from self.answers
        if self.error is not None:
            raise self.error


class Absent:
    """A plugin that needs no model to say what it says."""

    @hookimpl
    def surgery_preflight(self):
        return ()


def finding(level, message="it is not well. Cure it."):
    return Diagnostic(level=level, subject="Net", fqn="head", message=message)


def test_errors_that_a_plugin_finds_refuse_the_model():
    """The core's own come first."""
    plugin = Careful(finding("note"), finding("error"))
    asked = Session([ToyPlugin(), Absent(), plugin], discover=False)
    model = nn.DataParallel(Net())

    with pytest.raises(PreflightError) as caught:
        asked.plan(model.module, GATE)
    with pytest.raises(PreflightError) as both:
        asked.plan_recipe(model, recipe())

    assert "Model cannot be worked on: Net at 'head': it is not well. Cure it." == str(caught.value)
    assert [finding("error")] == list(caught.value.diagnostics)
    assert ["DataParallel", "Net"] == [found.subject for found in both.value.diagnostics]
    assert [model.module, model] == plugin.asked


def test_notes_that_a_plugin_makes_refuse_nothing():
    plugin = Careful(finding("note"))
    asked = Session([ToyPlugin(), plugin], discover=False)
    model = Net()

    asked.plan(model, [Rule(operation="gate", select=OfClass(nn.Linear))]).apply().revert()

    assert [finding("note")] == asked.plugins.preflight(model)
    assert [model, model] == plugin.asked


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (Careful(finding("note"), error=KeyError("no")), "KeyError('no')"),
        (Careful("not well"), "TypeError(\"expected a Diagnostic, got 'not well'\")"),
    ],
)
def test_a_plugin_that_fails_to_look_is_named(plugin, reason):
    asked = Session([ToyPlugin(), plugin], discover=False)
    model = Net()
    before = snapshot(model)

    with pytest.raises(PluginError) as caught:
        asked.plan(model, GATE)

    assert f"Plugin 'Careful' failed in surgery_preflight: {reason}." == str(caught.value)
    assert "Careful" == caught.value.plugin
    assert caught.value.__cause__ is not None
    assert_unchanged(before, model, subject="A failure")
