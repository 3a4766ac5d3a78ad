"""Training: what is trained and what is not, groups, checkpoints, and resuming to the same values."""

import json
import math

import pytest
import torch
from support.trainable import pairs, write_lines, write_task
from surgery_training import History, load_training_settings
from surgery_training.run import train
from surgery_training.trainer import AdapterTrainer, checkpoints_in, is_gate, last_checkpoint
from transformers import LlamaForCausalLM

from surgery_core import (
    OptionsError,
    RecordError,
    Session,
    load,
    load_recipe,
    read_record,
)

pytestmark = pytest.mark.slow


class Interrupted(Exception):  # noqa: N818 (no error)
    pass


class Observer:
    """Takes note of everything, and interrupts the training at a step."""

    def __init__(self, stop=None):
        self.stop = stop
        self.steps = []
        self.measured = []

    def on_step(self, step, total, loss):
        self.steps.append((step, total))
        assert loss > 0
        if step == self.stop:
            raise Interrupted

    def on_evaluate(self, step, total, loss):
        self.measured.append((step, total))
        assert loss > 0


def run(files, out, **values):
    recipe, training = files
    return train(load_recipe(recipe), load_training_settings(training), out, **values)


def tensors(folder):
    (state,) = read_record(folder).state.values()
    return state


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("adapter", ["prompts", "low_rank", "scales"])
def test_an_adapter_is_trained_and_the_base_is_not(tmp_path, adapter):
    """The record is loaded by the core, and the model computes what was measured at the end."""
    files = write_task(tmp_path, adapter, max_steps=30, learning_rate=0.05, evaluate_every=10)
    before = LlamaForCausalLM.from_pretrained(tmp_path / "llama").state_dict()
    observer = Observer()

    outcome = run(files, tmp_path / "out", observer=observer)

    losses = outcome.history.losses
    assert outcome.trained == ("own",)
    assert [step for step, _ in losses] == list(range(1, 31))
    assert observer.steps == [(step, 30) for step in range(1, 31)]
    assert observer.measured == [(10, 30), (20, 30), (30, 30)]
    assert outcome.history.validation[-1][1] < losses[0][1]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert_same(before, model.state_dict())
    edited = load(model, tmp_path / "out", base_check="error")
    assert outcome.num_parameters == sum(p.numel() for p in edited.added_parameters())
    assert all(p.dtype == torch.float32 for p in edited.added_parameters())
    data = json.loads((tmp_path / "out/training.json").read_text())
    assert data["validation"] == [list(item) for item in outcome.history.validation]
    assert data["settings"]["seed"] == 0
    assert {"python", "surgery-core", "torch", "transformers"} <= data["versions"].keys()
    assert (tmp_path / "out/curves.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("adapter", ["prompts", "low_rank"])
@pytest.mark.parametrize("stop", [2, 4, 9])
def test_a_resumed_training_gives_the_same_values(tmp_path, adapter, stop):
    """Before the first checkpoint, within an epoch and in a later one; dropout and order included."""
    files = write_task(
        tmp_path, adapter, max_steps=11, save_every=3, evaluate_every=4, gradient_accumulation=2
    )
    whole = run(files, tmp_path / "whole")

    with pytest.raises(Interrupted):
        run(files, tmp_path / "out", observer=Observer(stop))
    done = Observer()
    resumed = run(files, tmp_path / "out", observer=done, resume=True)

    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "out"))
    assert whole.history == resumed.history
    assert done.steps[0][0] == stop - (stop - 1) % 3
    assert (tmp_path / "whole/curves.svg").read_text() == (tmp_path / "out/curves.svg").read_text()


def test_the_seed_makes_the_values(tmp_path):
    first = write_task(tmp_path, max_steps=3)
    run(first, tmp_path / "a")
    run(first, tmp_path / "b")
    run(write_task(tmp_path, max_steps=3, seed=1), tmp_path / "c")

    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert any(
        not torch.equal(tensor, tensors(tmp_path / "c")[name])
        for name, tensor in tensors(tmp_path / "a").items()
    )


def test_packing_trains_as_padding_does(tmp_path):
    """The same losses at each step, without dropout, but for the order of sums."""
    model = LlamaForCausalLM.from_pretrained(write_task(tmp_path)[0].parent / "llama")
    model.config.attention_dropout = 0.0
    model.save_pretrained(tmp_path / "llama")
    values = {"max_steps": 8, "learning_rate": 0.1}

    padded = run(write_task(tmp_path, **values), tmp_path / "padded")
    packed = run(write_task(tmp_path, **values, collator="packing"), tmp_path / "packed")

    for one, other in zip(padded.history.losses, packed.history.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert any(values[-1][1] > 0.01 for values in packed.history.gates.values())


def test_accumulated_steps_are_those_of_one_batch(tmp_path):
    """Over all labels of a step, however many each batch has."""
    model = LlamaForCausalLM.from_pretrained(write_task(tmp_path)[0].parent / "llama")
    model.config.attention_dropout = 0.0
    model.save_pretrained(tmp_path / "llama")

    one = run(write_task(tmp_path, batch_size=12, max_steps=1), tmp_path / "one")
    values = {"batch_size": 3, "gradient_accumulation": 4, "max_steps": 1}
    many = run(write_task(tmp_path, **values), tmp_path / "many")

    assert one.history.losses[0] == pytest.approx(many.history.losses[0], rel=1e-5)
    for name, tensor in tensors(tmp_path / "one").items():
        torch.testing.assert_close(tensors(tmp_path / "many")[name], tensor, atol=1e-4, rtol=1e-3)


def test_gates_have_a_rate_of_their_own(tmp_path, monkeypatch):
    made = {}

    def keep(self, *args, **kwargs):
        optimizer = original(self, *args, **kwargs)
        made["groups"] = [dict(group) for group in optimizer.param_groups]
        made["sizes"] = [sum(p.numel() for p in g["params"]) for g in optimizer.param_groups]
        return optimizer

    original = AdapterTrainer.create_optimizer
    monkeypatch.setattr(AdapterTrainer, "create_optimizer", keep)
    files = write_task(
        tmp_path, max_steps=1, learning_rate=0.01, gate_learning_rate=0.5, weight_decay=0.1
    )

    outcome = run(files, tmp_path / "out")

    others, gates = made["groups"]
    assert (others["lr"], others["weight_decay"], gates["lr"], gates["weight_decay"]) == (
        *(0.01, 0.1),
        *(0.5, 0.0),
    )
    # Two layers: three prompts of 32 values each, and four heads.
    assert made["sizes"] == [192, 8]
    # The first step of Adam moves each value by its rate, which has risen half of the way.
    for values in outcome.history.gates.values():
        assert values == ((1, pytest.approx(0.25, rel=1e-2)),)


def test_gates_are_known_by_their_own_names():
    assert is_gate("model.layers.1.self_attn.adaption_gate", "*gate*")
    assert not is_gate("model.layers.1.mlp.gate_proj.lora_A", "*gate*")
    assert not is_gate("model.layers.1.self_attn.adaption_prompt", "*gate*")


def test_training_stops_when_nothing_gets_better_and_the_best_values_are_kept(tmp_path):
    """What is learned is the contrary of what is measured, which gets worse and worse."""
    values = {
        "learning_rate": 0.2,
        "max_steps": 40,
        "evaluate_every": 2,
        "save_every": 4,
        "early_stopping": 2,
        "warmup": 0,
    }
    files = write_task(tmp_path, **values)
    contrary = [{**row, "answer": "wxyz"} for row in pairs(5)]
    write_lines(tmp_path / "held.jsonl", contrary)

    outcome = run(files, tmp_path / "out")

    best_step, best_loss = outcome.history.best
    assert outcome.steps < 40
    assert outcome.steps == best_step + 4
    assert outcome.kept == best_step
    assert best_loss < outcome.history.validation[-1][1]
    files[1].write_text(files[1].read_text().replace("{", '{"keep": "last", ', 1))
    run(files, tmp_path / "last")
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "last")
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())

    # Killed between the last checkpoint and the record: nothing is left to be trained.
    files[1].write_text(files[1].read_text().replace('"last"', '"best"'))
    for name in ("training.json", "surgery.safetensors"):
        (tmp_path / "out" / name).unlink()
    again = run(files, tmp_path / "out", resume=True)
    assert (again.steps, again.kept) == (outcome.steps, outcome.kept)
    assert_same(one, tensors(tmp_path / "out"))


def test_a_bfloat16_base_has_float32_adapters_and_a_record_of_the_base_as_it_is_saved(tmp_path):
    files = write_task(tmp_path, "low_rank", max_steps=4, dtype=torch.float32)
    training = json.loads(files[1].read_text())
    files[1].write_text(json.dumps({**training, "dtype": "bfloat16", "learning_rate": 0.05}))

    run(files, tmp_path / "out")

    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.float32}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    edited = load(model, tmp_path / "out", base_check="error")
    assert edited.model(torch.tensor([[5, 6]])).logits.dtype == torch.float32
    assert float(tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.lora_B"].abs().max())
    # Where it is saved as bfloat16 there is nothing to cast.
    other = tmp_path / "other"
    other.mkdir()
    run(write_task(other, "low_rank", dtype=torch.bfloat16, max_steps=2), other / "out")
    model = LlamaForCausalLM.from_pretrained(other / "llama", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert load(model, other / "out").added_parameters()[0].dtype == torch.float32


def test_checkpointed_layers_give_the_same_values(tmp_path):
    plain = run(write_task(tmp_path, max_steps=3), tmp_path / "plain")
    other = run(write_task(tmp_path, max_steps=3, gradient_checkpointing=True), tmp_path / "other")

    assert plain.history.losses == other.history.losses
    assert_same(tensors(tmp_path / "plain"), tensors(tmp_path / "other"))


def test_rules_are_trained_beside_an_adapter_and_other_adapters_stay(tmp_path):
    recipe, training = write_task(tmp_path, max_steps=3)
    data = json.loads(recipe.read_text())
    part = data["models"]["chat"]
    part["rules"] = [{"operation": "scale_shift", "select": "**.down_proj"}]
    part["adapters"]["other"] = part["adapters"]["own"]
    part["active"] = "other"
    recipe.write_text(json.dumps(data))

    outcome = run((recipe, training), tmp_path / "out", adapter="own")

    assert outcome.trained == ("rules", "own")
    record = read_record(tmp_path / "out")
    assert record.recipe.active == "own"
    assert any(bool((tensor != 1).any()) for tensor in record.state["rules"].values())
    gates = [tensor for name, tensor in record.state["other"].items() if name.endswith("gate")]
    assert not any(bool(gate.any()) for gate in gates)
    assert all(
        bool(tensor.any()) for name, tensor in record.state["own"].items() if name.endswith("gate")
    )


def test_checkpoints_have_what_was_added_and_nothing_of_the_base(tmp_path):
    files = write_task(tmp_path, max_steps=5, save_every=2)

    run(files, tmp_path / "out")

    found = checkpoints_in(tmp_path / "out/checkpoints")
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-5"]
    assert sorted(path.name for path in found[-1].iterdir()) == [
        "best.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "surgery.safetensors",
        "trainer_state.json",
    ]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert len(load(model, found[0]).added_parameters()) == 4
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(found[-1] / name, weights_only=True)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    files = write_task(tmp_path, max_steps=5, save_every=2)
    with pytest.raises(Interrupted):
        run(files, tmp_path / "out", observer=Observer(5))
    last = last_checkpoint(tmp_path / "out/checkpoints")
    (last / "surgery.safetensors").write_bytes(b"no")

    with pytest.raises(RecordError, match=r"Checkpoint .*checkpoint-4' is damaged"):
        run(files, tmp_path / "out", resume=True)
    assert last_checkpoint(tmp_path) is None


def test_a_folder_with_a_training_is_not_written_over(tmp_path):
    files = write_task(tmp_path, max_steps=3, save_every=2)
    with pytest.raises(Interrupted):
        run(files, tmp_path / "out", observer=Observer(3))

    with pytest.raises(OptionsError, match="has a training already"):
        run(files, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "another 'seed' (seed: 0 then, 4 now)"),
        ({"batch_size": 2, "max_steps": 4}, "another 'batch_size', 'max_steps'"),
    ],
)
def test_another_training_is_not_resumed(tmp_path, change, message):
    with pytest.raises(Interrupted):
        run(write_task(tmp_path, max_steps=3), tmp_path / "out", observer=Observer(1))

    with pytest.raises(OptionsError) as caught:
        run(write_task(tmp_path, **{"max_steps": 3, **change}), tmp_path / "out", resume=True)

    assert message in str(caught.value)


def test_other_data_or_another_recipe_is_not_resumed(tmp_path):
    files = write_task(tmp_path, max_steps=3)
    with pytest.raises(Interrupted):
        run(files, tmp_path / "out", observer=Observer(1))

    write_lines(tmp_path / "train.jsonl", pairs(12))
    with pytest.raises(OptionsError, match="another 'train'"):
        run(files, tmp_path / "out", resume=True)
    write_task(tmp_path, "low_rank", max_steps=3)
    with pytest.raises(OptionsError, match="another 'recipe'"):
        run(files, tmp_path / "out", resume=True)


def test_a_folder_with_a_record_is_not_written_over(tmp_path):
    files = write_task(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    session = Session()
    session.save(session.plan_recipe(model, load_recipe(files[0])).apply(), tmp_path / "out")

    with pytest.raises(OptionsError, match="has a record that is of no training"):
        run(files, tmp_path / "out")


def test_losses_that_are_not_finite_end_the_training(tmp_path):
    model_folder = write_task(tmp_path)[0].parent / "llama"
    model = LlamaForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    model.save_pretrained(model_folder)

    with pytest.raises(OptionsError, match="Loss is not finite at step 1: expected a number"):
        run(write_task(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out/surgery.safetensors").exists()


@pytest.mark.parametrize(
    ("values", "part", "message"),
    [
        ({}, {"freeze": False}, "Model 'chat' has 'freeze: false'"),
        ({"gate_learning_rate": 0.1, "gate_pattern": "*door*"}, {}, "'*door*' matches no gate"),
        ({}, {"adapters": "is_trainable"}, "Nothing of 'own' is trained"),
        ({"template": "plain", "max_length": 5}, {}, "expected at most 5 tokens (max_length)"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, values, part, message):
    recipe, training = write_task(tmp_path, **values)
    data = json.loads(recipe.read_text())
    if part == {"adapters": "is_trainable"}:
        own = {"operation": "scale_shift", "select": "**.up_proj", "options": part}
        own["options"] = {"is_trainable": False}
        part = {"adapters": {"own": own}}
    data["models"]["chat"].update(part)
    recipe.write_text(json.dumps(data))

    with pytest.raises(OptionsError) as caught:
        run((recipe, training), tmp_path / "out")

    assert message in str(caught.value)


def test_the_first_of_the_lowest_losses_is_the_best():
    history = History(validation=((2, 3.0), (4, 2.0), (6, 2.0), (8, 2.5)))

    assert history.best == (4, 2.0)
    assert history.is_exhausted(2)
    assert not history.is_exhausted(3)
    assert not history.is_exhausted(None)
    assert History().best is None
    assert not History().is_exhausted(1)


@pytest.mark.parametrize(("plugin", "name"), [("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")])
def test_a_launch_that_shards_the_model_is_refused(tmp_path, monkeypatch, plugin, name):
    made = AdapterTrainer.create_accelerator_and_postprocess

    def sharding(self):
        made(self)
        setattr(self, f"is_{plugin}_enabled", True)

    monkeypatch.setattr(AdapterTrainer, "create_accelerator_and_postprocess", sharding)
    files = write_task(tmp_path, "prompts", max_steps=1)

    with pytest.raises(OptionsError, match=f"Training by {name} is not possible here"):
        run(files, tmp_path / "out", observer=Observer())
