"""With parameters partitioned by DeepSpeed ZeRO-3: trained if it came last, saved once gathered, else refused."""

import pytest
import torch
from distributed.launching import SCRIPTS, Outcome, assert_near, launch
from distributed.steps import IDS, base, edit, optimizer
from safetensors.torch import load_file
from surgery_adaption_prompt import AdaptionPromptModel

from surgery_core import Session

pytest.importorskip("deepspeed", reason="needs deepspeed, and a C++ compiler")

pytestmark = pytest.mark.slow

LOSS = 5e-6
"""In float32, as is everything here; DeepSpeed divides gradients before it adds them up."""
TRAINED = 5e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    launch(SCRIPTS / "zero3.py", folder)
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    return Outcome.of(folder)


def test_training_gives_what_one_process_gets(outcome, folder):
    """Gathered by every process, the tensors are saved, and load in one process."""
    model, other = base(torch.float32), base(torch.float32)
    edited = edit(model)
    losses, steps = [], optimizer(model)
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    loaded = Session().load(other, folder / "record", base_check="error")

    outcome.assert_same()
    for facts in outcome.facts:
        assert losses == pytest.approx(facts["losses"], abs=LOSS)
    assert_near(edited.tensors("a"), outcome.group("trained"), TRAINED)
    assert_near(outcome.group("trained"), loaded.tensors("a"), 0)


def test_an_adapter_that_was_gathered_loads_in_one_process(outcome, folder):
    AdaptionPromptModel.from_pretrained(base(torch.float32), folder / "adapter", base_check="error")

    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    own = {f"base_model.model.{key}": tensor for key, tensor in outcome.group("trained").items()}
    assert_near(own, state, 0)


def test_what_has_no_values_is_refused(outcome):
    for facts in outcome.facts:
        assert [["error", "32 modules partitioned by DeepSpeed"]] == facts["found"]
        assert [["error", "1 module partitioned by DeepSpeed"]] == facts["initialised"]
        assert "PreflightError" == facts["planned"][0]
        assert "StateError" == facts["saved"][0] == facts["loaded"][0]
        assert facts["saved"][1].startswith("Tensor is partitioned by DeepSpeed (ZeRO-3): expected")
        assert facts["saved"] == facts["exported"]
        assert "got one that DeepSpeed has partitioned" in facts["loaded"][1]
        assert "ContractError" == facts["switched"][0]
        assert "a" == facts["active"]
