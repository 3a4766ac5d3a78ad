"""With heads spread over two processes by transformers' `tp_plan`, all is as in one process."""

import pytest
import torch
from distributed.launching import (
    EXAMPLES,
    SCRIPTS,
    Outcome,
    assert_near,
    assert_same_folders,
    launch,
)
from distributed.steps import FEATURES, IDS, PROMPTS, base, edit, facade, logits, train
from safetensors.torch import load_file
from surgery_adaption_prompt import AdaptionPromptModel, conditioned
from transformers import AutoModelForCausalLM

from surgery_core import Session

pytestmark = pytest.mark.slow

FORWARD = 1e-12
"""Float64; sums over heads are taken in another order."""
LOSS = 2e-6
"""Transformers computes the loss in float32, and so are all gradients that come from it."""
TRAINED = 1e-5
"""Three steps of AdamW, whose steps are of the size of the rate wherever gradients are not tiny."""

EXAMPLE = 2e-5
"""The same in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes left what came of it."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    base().save_pretrained(folder / "base")
    launch(SCRIPTS / "tensor_parallel.py", folder / "base", folder)
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    return Outcome.of(folder)


def gradients(**options):
    """Return logits and gradients of one process."""
    model = base()
    edit(model, a={**PROMPTS, "options": {**PROMPTS["options"], **options}})
    with conditioned(FEATURES):
        found = logits(model)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_an_untrained_adapter_changes_nothing(outcome):
    """Compared with the same spread model, bit for bit; also by `verify`, and after a revert."""
    for facts in outcome.facts:
        assert 23 == facts["sharded"]
        assert facts["is_exact"]
        assert facts["is_reverted"]
        assert facts["is_unchanged"]
        assert {"ok"} == {status for _, status in facts["checks"]}


def test_all_processes_have_the_same_tensors_at_every_moment(outcome):
    """Also the first prompts, although each process would have drawn others."""
    outcome.assert_same()
    assert any(tensor.any() for tensor in outcome.group("first").values())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("head", {}),
        ("layer", {"gate": "layer"}),
        ("tanh", {"gate_activation": "tanh"}),
        ("conditioned", {"condition_size": 5, "condition_rank": 2}),
    ],
)
def test_outputs_and_gradients_are_those_of_one_process(outcome, name, options):
    """Gates count for the heads they are for, and their gradients are of all heads."""
    expected, grads = gradients(**options)

    assert_near({"": expected}, outcome.group(f"logits {name}"), FORWARD)
    assert (8 if name == "conditioned" else 4) == len(grads)
    assert all(grad.any() for grad in grads.values())
    assert_near(grads, outcome.group(f"gradients {name}"), LOSS)


def test_training_gives_what_one_process_gets(outcome):
    model = base()
    edited = edit(model)
    losses = train(model)

    for facts in outcome.facts:
        assert losses == pytest.approx(facts["losses"], abs=LOSS)
    assert losses[-1] < losses[0]
    assert_near(edited.tensors("a"), outcome.group("trained"), TRAINED)
    after = outcome.group("after")
    assert_near({"logits": logits(model), "again": logits(model)}, after, 10 * TRAINED)
    assert_near({"": after["logits"]}, {"": after["again"]}, FORWARD)


def test_a_saved_adapter_has_the_format_of_one_process_and_loads_in_it(outcome, folder, tmp_path):
    adapted = facade(base())
    train(adapted)
    adapted.save_pretrained(tmp_path)

    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        p.name for p in (folder / "adapter").iterdir()
    )
    expected, actual = (
        load_file(where / "adapter_model.safetensors") for where in (tmp_path, folder / "adapter")
    )
    assert_near(expected, actual, TRAINED)
    config = "adapter_config.json"
    # But for the name of the base, which was read from a folder there.
    ours, theirs = (
        [line for line in (where / config).read_text().splitlines() if "base_model" not in line]
        for where in (tmp_path, folder / "adapter")
    )
    assert ours == theirs
    # The record of the base beside it is of all heads, so that this does not raise.
    loaded = AdaptionPromptModel.from_pretrained(base(), folder / "adapter", base_check="error")
    assert_near({"logits": logits(loaded)}, outcome.group("facade"), FORWARD)
    assert_near({"logits": logits(loaded)}, outcome.group("loaded"), FORWARD)


def test_a_record_loads_in_one_process(outcome, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64).eval()

    Session().load(model, folder / "record", base_check="error")

    assert_near({"": logits(model)}, {"": outcome.group("after")["logits"]}, FORWARD)


def test_rows_may_have_adapters_of_their_own(outcome):
    rows = outcome.group("rows")["logits"]
    plain, adapted = logits(base()), outcome.group("loaded")["logits"]

    assert_near(
        {"": torch.stack([adapted[0], plain[1], adapted[2], adapted[3]])}, {"": rows}, FORWARD
    )


def test_what_needs_whole_weights_is_refused(outcome):
    spread = "expected whole weights, got some that are spread over processes."
    first, layers = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn"
    stay = "Choose layers that stay whole, or a model that is not spread."

    for facts in outcome.facts:
        for name in ("low_rank", "scale_shift"):
            message = f"Operation {name!r} cannot work at {first!r}: {spread} {stay}"
            assert ["ContractError", message] == facts[name]
        message = f"Operation 'trainable_copy' cannot work at 'lm_head': {spread} Choose modules that stay whole."
        assert ["ContractError", message] == facts["trainable_copy"]
        message = f"Adapter cannot be merged at '{layers}.o_proj': {spread} Keep the adapter in the model."
        assert ["ContractError", message] == facts["merge"]
        message = f"fixed_rows is not possible at {layers!r}: {spread} Use adapter_names."
        assert ["ContractError", message] == facts["fixed_rows"]


def test_a_spread_model_is_noted(outcome):
    message = (
        "23 modules spread over processes at 'model.embed_tokens': each process has a part of their "
        "weights. Apply in all of them; what needs whole weights is refused."
    )

    assert [[message]] * 2 == [facts["notes"] for facts in outcome.facts]


def test_the_example_gives_what_one_process_gets(alone, losses):
    printed = launch(EXAMPLES / "tensor_parallel.py", *alone.arguments("spread"))

    assert alone.losses == pytest.approx(losses(printed), abs=EXAMPLE)
    assert_same_folders(alone.folder / "alone", alone.folder / "spread", EXAMPLE)
