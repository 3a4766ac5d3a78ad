"""Rows in buffers follow what changes: uncompiled code at once, compiled code when it is told."""

import pytest
import torch
from adaption_prompt.test_fixed_rows import IDS, alone, close, compiled_, logits, make
from support.families import open_gates_

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # Of transformers' own collector of outputs.
    "ignore:While compiling, we found certain side effects:UserWarning",
)


@pytest.fixture
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def hot_swap(model, folder):
    other = make()
    open_gates_(other.adapter_modules("legal"), seed=8, size=2.0)
    other.save_pretrained(folder)
    model.hotswap_adapter(folder / "legal", "legal")


def load_other_base(model, _):
    """A state dict taken with the rows in place has the base's tensors alone."""
    state = {
        key: tensor * 1.5 if "v_proj" in key else tensor
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)


THROUGH_US = {
    "hot swap": hot_swap,
    "load_state_dict": load_other_base,
    "double": lambda model, _: model.double(),
    "half and back": lambda model, _: model.half().float(),
}
BY_HAND = {
    "gate": lambda model, _: [
        m.adaption_gate.mul_(-3) for m in model.adapter_modules("legal").values()
    ],
    "prompt": lambda model, _: [
        m.adaption_prompt.mul_(-3) for m in model.adapter_modules("legal").values()
    ],
    "key projection": lambda model, _: model.model.model.layers[2].self_attn.k_proj.weight.add_(
        0.3
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("change", [*THROUGH_US, *BY_HAND])
def test_rows_follow_what_changes(change, tmp_path):
    """Uncompiled code at once, compiled code after changes through us, or after `refresh`."""
    model = make()
    ids = IDS[:2]
    before = alone(model, ["fr", "legal"], ids)
    with model.fixed_rows(2) as rows, torch.no_grad():
        rows.assign(["fr", "legal"])
        run = compiled_(model)
        assert close(run(ids).logits, before, 1e-5)

        {**THROUGH_US, **BY_HAND}[change](model, tmp_path)

        actual = logits(model, ids)
        if change in BY_HAND:
            rows.refresh()
        compiled = run(ids).logits
    expected = alone(model, ["fr", "legal"], ids)
    assert close(actual, expected, 1e-5)
    assert close(compiled, expected, 1e-5)
    assert "double" in change or "half" in change or not close(expected, before, 1e-3)


def test_rows_of_a_half_precision_base_keep_buffers_that_hold_their_values():
    """Gated values of float16 are wider than float16."""
    model = make()
    with model.fixed_rows(2) as rows:
        rows.assign(["fr", "legal"])
        model.half()
        module = model.get_base_model().model.layers[2].self_attn
        assert torch.float32 is module.adaption_row_value.dtype
