"""With parameters sharded over two processes by `fully_shard` (FSDP2), all is as in one process."""

import pytest
import torch
from distributed.launching import SCRIPTS, Outcome, assert_near, launch
from distributed.steps import LORA, PROMPTS, base, edit, facade, logits, several, train, turned
from safetensors.torch import load_file
from surgery_adaption_prompt import AdaptionPromptModel

from surgery_core import Session

pytestmark = pytest.mark.slow

FORWARD = 1e-12
"""Float64, the same operations on gathered parameters."""
LOSS = 2e-6
"""Transformers computes the loss in float32; the mean of two means is rounded once more."""
TRAINED = 1e-5
"""Three steps of AdamW, whose steps are of the size of the rate wherever gradients are not tiny."""
MIXED = 0.02
"""Losses of about four, in bfloat16, which has eight bits."""

KINDS = {
    "prompts": {"a": PROMPTS},
    "lora": {"a": LORA},
    "both": {"a": {"rules": [PROMPTS, LORA]}},
}
FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fully_sharded")
    launch(SCRIPTS / "fully_sharded.py", folder)
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    return Outcome.of(folder)


def test_an_untrained_adapter_changes_nothing(outcome):
    """Compared with the same sharded base, bit for bit; also while disabled, and after a revert."""
    for facts in outcome.facts:
        assert [34, 34] == facts["sharded"]
        assert facts["is_exact"]
        assert facts["is_exact_while_disabled"]
        assert facts["is_reverted"]
        assert ["ok"] * 3 == facts["checks"]


def test_all_processes_have_the_same_tensors(outcome):
    outcome.assert_same()


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_what_one_process_gets(outcome, folder, kind):
    """The losses, the tensors, and the record, for which they were gathered."""
    model, other = base(), base()
    edited = edit(model, **KINDS[kind])
    losses = train(model)
    loaded = Session().load(other, folder / f"record {kind}")

    for facts in outcome.facts:
        assert losses == pytest.approx(facts[f"losses {kind}"], abs=LOSS)
        num_tensors, num_whole = facts[f"wholes {kind}"]
        assert num_tensors > num_whole == 0
    assert losses[-1] < losses[0]
    assert_near(edited.tensors("a"), outcome.group(f"trained {kind}"), TRAINED)
    assert_near(outcome.group(f"trained {kind}"), loaded.tensors("a"), 0)
    assert_near({"": logits(model)}, {"": logits(other)}, 10 * TRAINED)


@pytest.mark.parametrize("kind", ["prompts", "lora"])
def test_exported_folders_have_the_format_of_one_process(outcome, folder, tmp_path, kind):
    edited = edit(base(), **KINDS[kind])
    Session().export(edited, "a", tmp_path)

    where = folder / f"export {kind}"

    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in where.iterdir())
    expected, actual = (load_file(found / FILES[1]) for found in (tmp_path, where))
    assert [(k, t.shape, t.dtype) for k, t in sorted(expected.items())] == [
        (k, t.shape, t.dtype) for k, t in sorted(actual.items())
    ]
    trained = outcome.group(f"trained {kind}")
    assert sorted(t.sum().item() for t in trained.values()) == sorted(
        t.sum().item() for t in actual.values()
    )


def test_a_saved_adapter_loads_in_one_process(outcome, folder, tmp_path):
    adapted = facade(base())
    train(adapted)
    adapted.save_pretrained(tmp_path)

    loaded = AdaptionPromptModel.from_pretrained(base(), folder / "adapter", base_check="error")

    assert_near(*(load_file(where / FILES[1]) for where in (tmp_path, folder / "adapter")), TRAINED)
    assert (tmp_path / FILES[0]).read_text() == (folder / "adapter" / FILES[0]).read_text()
    assert_near({"logits": logits(loaded)}, outcome.group("facade"), FORWARD)


def test_loading_gives_each_process_its_part(outcome, folder):
    """Also where the root's parameters were gathered at the time, and for `hotswap_adapter`."""
    model = base()
    edit(model).load_("a", outcome.group("stored"))
    trained = AdaptionPromptModel.from_pretrained(base(), folder / "adapter")

    for facts in outcome.facts:
        assert facts["is_loaded"]
        assert facts["is_sharded_still"]
        assert facts["optimizer_has_parts"]
        assert facts["misfit"][0] == "StateError"
        assert "expected shape (4,), got (1,)" in facts["misfit"][1]
    for group in ("loaded", "loaded at the root"):
        assert_near({"logits": logits(model)}, outcome.group(group), FORWARD)
    assert_near({"logits": logits(trained)}, outcome.group("hotswapped"), FORWARD)


@pytest.mark.parametrize("number", range(4))
def test_every_evaluation_sees_the_tensors_that_were_loaded_before_it(outcome, number):
    model = base()
    edit(model).load_("a", turned(outcome.group("stored"), number))

    assert_near({"logits": logits(model)}, outcome.group(f"evaluation {number}"), FORWARD)


def test_frozen_adapters_are_switched_in_a_sharded_model(outcome, folder):
    """Those of a folder and of a recipe, for all and by row; and back to the sharded one."""
    trained = AdaptionPromptModel.from_pretrained(base(), folder / "adapter")
    model = base()
    edited = several(model)

    assert_near({"logits": logits(trained)}, outcome.group("frozen"), FORWARD)
    for name in ("b", "d"):
        edited.set_active(name)
        expected = {"logits": logits(model), **edited.tensors(name)}
        assert_near(expected, outcome.group(name), FORWARD)
    assert all(facts["is_back"] for facts in outcome.facts)
    plain, rows = logits(base()), outcome.group("rows")["logits"]
    expected = torch.cat([logits(trained)[:2], plain[2:]])
    assert_near({"": expected}, {"": rows}, FORWARD)


def test_what_would_not_be_sharded_is_refused(outcome):
    """A plan, a trainable adapter of each process alone, and others' sharded parameters."""
    refused = "Model cannot be worked on: FSDPModule at the root: its parameters are sharded. "
    enters = (
        "Variant {!r} cannot enter a sharded model at 'model.layers.1.self_attn': expected "
        "parameters that were sharded with it, or frozen ones, got "
    )
    alone = (
        "trainable ones that each process has for itself. Make it active before the model is "
        "sharded, or freeze its parameters."
    )
    others = (
        "some that were sharded in another. Stay with what was active when the model was sharded."
    )
    expected = {
        "trained": (enters + alone).format("trained"),
        "c": (enters + alone).format("c"),
        "composed": (enters + others).format("derived/composed"),
        "sum": (enters + others).format("composition/1"),
        "out_of_sum": (enters + others).format("a"),
    }

    for facts in outcome.facts:
        assert facts["planned_again"][0] == "PreflightError"
        assert facts["planned_again"][1].startswith(f"{refused}Apply before `fully_shard`.")
        for name, message in expected.items():
            assert ["ContractError", message] == facts[name]
        assert ("frozen", "b") == (facts["active"], facts["active_after"])


def test_a_sum_that_was_made_before_is_trained(outcome):
    model = base()
    edited = edit(model, a=PROMPTS, b=LORA)
    edited.set_active({"a": 1.0, "b": 0.5})
    losses = train(model)

    for facts in outcome.facts:
        assert losses == pytest.approx(facts["losses_sum"], abs=LOSS)
    assert_near({**edited.tensors("a"), **edited.tensors("b")}, outcome.group("sum"), TRAINED)


def test_mixed_precision_keeps_adapters_wide(outcome):
    """Gathered in bfloat16, stored and stepped in float32."""
    model = base(torch.float32)
    edit(model)
    losses = train(model)

    for facts in outcome.facts:
        assert losses == pytest.approx(facts["losses_mixed"], abs=MIXED)
        assert facts["losses_mixed"][-1] < facts["losses_mixed"][0]
        assert ["torch.float32"] == facts["dtypes"]
