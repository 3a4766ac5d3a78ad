"""With half the batch in each of two processes, training gives what one process gets with all of it."""

import pytest
from distributed.launching import (
    EXAMPLES,
    SCRIPTS,
    Outcome,
    assert_near,
    assert_same_folders,
    launch,
)
from distributed.steps import LORA, PROMPTS, base, edit, logits, train
from surgery_adaption_prompt import AdaptionPromptModel
from transformers import AutoModelForCausalLM

from surgery_core import Session

pytestmark = pytest.mark.slow

LOSS = 2e-6
"""Transformers computes the loss in float32; the mean of two means is rounded once more."""
TRAINED = 1e-5
"""Three steps of AdamW, whose steps are of the size of the rate wherever gradients are not tiny."""
EXAMPLE = 2e-5
"""The same in float32."""

KINDS = {
    "prompts": {"a": PROMPTS},
    "lora": {"a": LORA},
    "both": {"a": {"rules": [PROMPTS, LORA]}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data_parallel")
    launch(SCRIPTS / "data_parallel.py", folder)
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    return Outcome.of(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_what_one_process_gets(outcome, folder, kind):
    """The losses, the tensors, and the record that the first process wrote of them."""
    model, other = base(), base()
    edited = edit(model, **KINDS[kind])
    losses = train(model)
    loaded = Session().load(other, folder / f"record {kind}", base_check="error")

    for facts in outcome.facts:
        assert losses == pytest.approx(facts[f"losses {kind}"], abs=LOSS)
    assert losses[-1] < losses[0]
    assert_near(edited.tensors("a"), outcome.group(f"trained {kind}"), TRAINED)
    assert_near(outcome.group(f"trained {kind}"), loaded.tensors("a"), 0)
    assert_near({"": logits(model)}, {"": logits(other)}, 10 * TRAINED)


def test_all_processes_have_the_same_adapter(outcome):
    outcome.assert_same()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_example_trains_by_accelerate_launch(alone, losses, kind):
    """Through the configuration files that the manual shows; FSDP2 wraps each transformer layer."""
    arguments = [EXAMPLES / "train.py", *alone.arguments(kind)]
    # accelerate leaves FSDP out where there are CPUs only, so a script tells it otherwise.
    if kind == "fsdp2":
        arguments.insert(0, SCRIPTS / "fsdp2_on_cpu.py")

    printed = launch(*arguments, config=EXAMPLES / f"{kind}.yaml")

    assert alone.losses == pytest.approx(losses(printed), abs=EXAMPLE)
    assert alone.losses[-1] < alone.losses[0]
    if kind == "fsdp2":
        assert 2 == printed.count("sharded: 34 of 34")
    assert_same_folders(alone.folder / "alone", alone.folder / kind, EXAMPLE)
    model = AutoModelForCausalLM.from_pretrained(alone.folder / "base")
    loaded = AdaptionPromptModel.from_pretrained(model, alone.folder / kind, base_check="error")
    assert logits(loaded).isfinite().all()
