"""PEFT as the oracle of LoRA: its folders compute the same here, and ours there."""

import json

import peft
import pytest
import torch
from support.families import build, tokens
from surgery_low_rank import LowRankLinear, merge_, plugin

from surgery_core import ModelRecipe, Session, SurgeryError

pytestmark = [
    pytest.mark.peft,
    # peft 0.21.2 and its dependencies warn about themselves; their warnings are not ours to mend.
    pytest.mark.filterwarnings("ignore"),
]

IDS = tokens(2, 7)
CASES = {
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["o_proj", "up_proj"],
    },
    "all": {"r": 2, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.1},
    "regex": {"r": 1, "lora_alpha": 1, "target_modules": r".*\.(0|2)\.self_attn\.k_proj"},
    "excluded": {
        "r": 2,
        "target_modules": ["q_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj"],
    },
    "head": {"r": 2, "target_modules": ["lm_head", "down_proj"], "init_lora_weights": "gaussian"},
}
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str
)


def session():
    return Session([plugin], discover=False)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def fill_(named, seed=0):
    """Give matrices values that differ from layer to layer, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in named:
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def saved(tmp_path, dtype, **fields):
    """Return a folder of PEFT's and what it computes there."""
    model = peft.get_peft_model(build(dtype=dtype), peft.LoraConfig(**fields)).eval()
    fill_(model.named_parameters())
    model.save_pretrained(tmp_path)
    return str(tmp_path), logits(model)


def recipe(**adapters):
    found = {name: {"operation": "low_rank", **value} for name, value in adapters.items()}
    return ModelRecipe.model_validate({"adapters": found, "active": next(iter(adapters))})


@every_case
@every_dtype
def test_a_folder_of_pefts_gives_its_very_logits(tmp_path, case, dtype):
    folder, expected = saved(tmp_path, dtype, **CASES[case])
    model = build(dtype=dtype)
    base = logits(model)

    session().plan_recipe(model, recipe(a={"source": folder})).apply()

    assert torch.equal(expected, logits(model))
    assert 1e-2 < (expected - base).abs().max()


@every_case
@every_dtype
def test_peft_loads_what_is_exported(tmp_path, case, dtype):
    fields = {
        name: value
        for name, value in CASES[case].items()
        if name in {"r", "lora_alpha", "use_rslora", "lora_dropout"}
    }
    names = CASES[case]["target_modules"]
    where = {} if isinstance(names, str) else {"target_modules": names}
    adapter = {"options": {**fields, **where}, "exclude": "model.layers.1.**"}
    model = build(dtype=dtype)
    base = logits(model)
    edited = session().plan_recipe(model, recipe(a=adapter)).apply()
    fill_(model.named_parameters())

    session().export(edited, "a", tmp_path)
    other = peft.PeftModel.from_pretrained(build(dtype=dtype), tmp_path)

    assert torch.equal(logits(model), logits(other))
    assert 1e-2 < (logits(model) - base).abs().max()
    mine = sum(isinstance(module, LowRankLinear) for module in model.modules())
    assert mine == sum(isinstance(m, peft.tuners.lora.Linear) for m in other.modules())


def test_a_folder_survives_both_ways(tmp_path):
    """Read here, written here, loaded and written by PEFT, and read here again."""
    folder, expected = saved(tmp_path / "peft", torch.float32, **CASES["plain"])
    model = build()
    edited = session().plan_recipe(model, recipe(a={"source": folder})).apply()
    session().export(edited, "a", tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(build(), tmp_path / "ours")
    other.save_pretrained(tmp_path / "again")

    last = build()
    session().plan_recipe(last, recipe(a={"source": str(tmp_path / "again")})).apply()

    assert torch.equal(expected, logits(last))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_that_were_saved_narrow_are_widened_as_in_peft(tmp_path, dtype):
    model = peft.get_peft_model(build(), peft.LoraConfig(**CASES["plain"])).eval()
    fill_(model.named_parameters())
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(build(), tmp_path)
    model = build()

    session().plan_recipe(model, recipe(a={"source": str(tmp_path)})).apply()

    assert torch.equal(logits(other), logits(model))


def test_several_at_once_are_those_of_peft(tmp_path):
    """Up to rounding: weights are a factor here, and a matrix of the sum of ranks there."""
    weights = {"a": 0.6, "b": -1.5}
    model = peft.get_peft_model(
        build(dtype=torch.float64), peft.LoraConfig(**CASES["plain"]), adapter_name="a"
    ).eval()
    model.add_adapter("b", peft.LoraConfig(**{**CASES["plain"], "r": 2}))
    fill_(model.named_parameters())
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(list(weights), list(weights.values()), "both", "cat")
    model.set_adapter("both")
    own = build(dtype=torch.float64)
    sources = {name: {"source": str(tmp_path / name)} for name in weights}

    edited = session().plan_recipe(own, recipe(**sources)).apply()
    edited.set_active(weights)

    torch.testing.assert_close(logits(own), logits(model), rtol=0, atol=1e-6)
    for name in weights:
        edited.set_active(name)
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(own))


def test_dropout_drops_what_pefts_does(tmp_path):
    fields = {**CASES["plain"], "lora_dropout": 0.5}
    folder, expected = saved(tmp_path, torch.float32, **fields)
    other = peft.PeftModel.from_pretrained(build(), folder).train()
    model = build().train()
    session().plan_recipe(model, recipe(a={"source": folder})).apply()
    model.train()

    found = []
    for each in (other, model):
        torch.manual_seed(1)
        found.append(logits(each))

    assert torch.equal(*found)
    assert not torch.equal(expected, found[0])


def test_gradients_are_those_of_peft(tmp_path):
    """With the values of one file, in float64 up to rounding; the base has none."""
    folder, _ = saved(tmp_path, torch.float64, **CASES["all"])
    other = peft.PeftModel.from_pretrained(build(dtype=torch.float64), folder, is_trainable=True)
    other.eval()
    model = build(dtype=torch.float64)
    trained = {"source": folder, "options": {"inference_mode": False}}
    edited = session().plan_recipe(model, recipe(a=trained)).apply()

    for each in (other, model):
        each(IDS, labels=IDS, use_cache=False).loss.backward()

    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in other.named_parameters()
        if "lora_" in name
    }
    mine = {name: tensor.grad for name, tensor in edited.tensors("a").items()}
    assert theirs.keys() == mine.keys()
    for name, grad in mine.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-9, atol=1e-12)


@every_case
def test_merged_weights_are_those_of_peft(tmp_path, case):
    folder, _ = saved(tmp_path, torch.float32, **CASES[case])
    model = build()
    edited = session().plan_recipe(model, recipe(a={"source": folder})).apply()
    merge_(edited)
    mine = edited.revert().state_dict()

    theirs = peft.PeftModel.from_pretrained(build(), folder).merge_and_unload().state_dict()

    assert theirs.keys() == mine.keys()
    for name, tensor in mine.items():
        # The same products in the same dtype.
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 5}}, "rank_pattern is {'q_proj': 5}"),
        ({"alpha_pattern": {"q_proj": 5}}, "alpha_pattern is {'q_proj': 5}"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"layers_to_transform": [1]}, r"layers_to_transform is \[1\]"),
    ],
)
def test_folders_of_pefts_that_compute_something_else_are_refused(tmp_path, fields, said):
    folder, _ = saved(tmp_path, torch.float32, **{**CASES["plain"], **fields})

    with pytest.raises(SurgeryError, match=said):
        session().plan_recipe(build(), recipe(a={"source": folder}))


def test_every_field_of_pefts_configuration_is_known(tmp_path):
    """With its default, none is refused; a new one that is on by default would show here."""
    folder, _ = saved(tmp_path, torch.float32, **CASES["plain"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    assert len(config) > 30
    assert session().plan_recipe(build(), recipe(a={"source": folder})).adapters
