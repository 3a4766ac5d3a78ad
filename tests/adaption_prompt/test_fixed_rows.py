"""Rows with adapters of their own in buffers: the same numbers, and nothing compiled anew."""

import copy

import pytest
import torch
from support.families import build, gpt2, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

from surgery_core import OptionsError, VariantError

CONFIGS = {
    "fr": AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head"),
    "legal": AdaptionPromptConfig(adapter_len=5, adapter_layers=3, gate_activation="tanh"),
}
NAMES = ["fr", "__base__", "legal", "fr"]
IDS = tokens(4, 6)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # Of transformers' own collector of outputs.
    "ignore:While compiling, we found certain side effects:UserWarning",
)


def make(base=None, configs=CONFIGS):
    model = AdaptionPromptModel(base or build(seed=1), configs, next(iter(configs))).eval()
    for seed, name in enumerate(configs):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def close(actual, expected, limit=1e-6):
    return bool((actual - expected).abs().max() <= limit * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_are_as_with_names(dtype):
    model = make(build(seed=1, dtype=dtype))
    with model.disable_adapter():
        base = logits(model)
    expected = logits(model, adapter_names=NAMES)
    keys = set(model.get_base_model().state_dict()) - {
        k for k in model.get_base_model().state_dict() if "adaption" in k
    }

    with model.fixed_rows(4) as rows:
        assert torch.equal(base, logits(model))
        rows.assign(NAMES)
        actual = logits(model)
        assert keys == set(model.get_base_model().state_dict())
        rows.assign(["__base__"])
        assert torch.equal(base, logits(model))

    limit = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 0.02)
    assert close(actual.float(), expected.float(), limit)
    assert torch.equal(base[1], actual[1])
    assert "fr" == model.active_adapter
    assert not any("rows" in name for name in model.swap_state.names)


class Counting:
    """A backend for `torch.compile` that counts graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_(model):
    return torch.compile(model.get_base_model(), fullgraph=True, backend="eager")


def alone(model, names, ids=IDS):
    """Return the logits of rows computed one at a time, each with its adapter alone."""
    found = []
    for name, row in zip(names, ids, strict=True):
        with model.disable_adapter() if name == "__base__" else model.activated(name):
            found.append(logits(model, row[None]))
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_batch_of_several_times_the_rows_gives_each_to_rows_in_succession(is_compiled):
    """As beam search lays them out; one graph for any number of names."""
    model = make()
    backend = Counting()
    chosen = [["fr"], ["__base__"], ["fr", "legal"], ["legal", "__base__"], NAMES]
    each = [[name for name in names for _ in range(4 // len(names))] for names in chosen]
    expected = [alone(model, names) for names in each]
    run = torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    with model.fixed_rows(4, adapter_len=7) as rows, torch.no_grad():
        for names, wanted in zip(chosen, expected, strict=True):
            rows.assign(names)
            assert close(run(IDS).logits if is_compiled else logits(model), wanted, 1e-5)

    assert backend.graphs == is_compiled


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize(("rows_of_batch", "names"), [(3, ["fr", "legal"]), (2, NAMES)])
def test_a_batch_that_is_no_multiple_of_the_rows_is_refused(rows_of_batch, names):
    model = make()
    with model.fixed_rows(4) as rows, torch.no_grad():
        rows.assign(names)
        with pytest.raises(OptionsError, match=f"Batch has {rows_of_batch} rows: expected"):
            model(IDS[:rows_of_batch])
        with pytest.raises(Exception, match=r"index.* out of (range|bounds)"):
            compiled_(model)(IDS[:rows_of_batch])


def test_beam_search_gives_the_beams_of_a_row_its_adapter():
    model = make()
    open_gates_(model.adapter_modules("fr"), seed=3, size=4.0)
    search = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    expected = [
        model.generate(row[None], adapter_names=[name], **search)
        for name, row in zip(["fr", "legal"], IDS[:2], strict=True)
    ]
    with model.fixed_rows(4) as rows:
        rows.assign(["fr", "legal"])
        actual = model.generate(IDS[:2], **search)

    assert torch.equal(torch.cat(expected), actual)


def test_assigned_adapters_stay():
    model = make()
    with model.fixed_rows(4) as rows:
        rows.assign(["legal", "__base__"])
        for call in (
            lambda: model.delete_adapter("legal"),
            lambda: model.rename_adapter("legal", "law"),
        ):
            with pytest.raises(VariantError, match="Adapter 'legal' is in use by fixed_rows"):
                call()
        assert model.is_in_use("legal")
        rows.assign(["fr"])
        assert not model.is_in_use("legal")
        model.delete_adapter("legal")


def test_rows_that_have_ended_are_not_assigned():
    model = make()
    with model.fixed_rows(4) as rows:
        model.set_adapter("legal")
        with pytest.raises(OptionsError, match="fixed_rows has ended, or another adapter was"):
            rows.assign(["fr"])
    with model.fixed_rows(4) as others:
        with pytest.raises(OptionsError, match="Rows cannot be assigned"):
            rows.assign(["fr"])
        others.assign(["fr"])


def test_rows_beyond_the_names_must_be_named():
    model = make()
    with model.disable_adapter():
        base = logits(model)
    with model.fixed_rows(8, adapter_len=7) as rows:
        rows.assign(["legal"] * 8)
        rows.assign(["fr", *["__base__"] * 3])
        actual = logits(model)

    assert torch.equal(base[1:], actual[1:])
    assert not close(actual[0], base[0], 1e-3)


def test_rows_of_gpt2_after_the_output_projection():
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=3, project_output=False)
    model = make(gpt2(), {"a": config, "b": config})
    expected = logits(model, adapter_names=["a", "b", "__base__", "a"])
    with model.fixed_rows(4) as rows:
        rows.assign(["a", "b", "__base__", "a"])
        assert close(logits(model), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
def test_a_hundred_assignments_compile_nothing_anew():
    """One graph without a break, also when the buffers are opened a second time."""
    model = make()
    assignments = [NAMES, ["legal"] * 4, ["__base__", "fr", "fr", "legal"], ["__base__"] * 4]
    expected = [logits(model, adapter_names=names) for names in assignments]
    backend = Counting()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    for _ in range(2):
        with model.fixed_rows(4) as rows, torch.no_grad():
            for count in range(50):
                rows.assign(assignments[count % 4])
                assert close(compiled(IDS).logits, expected[count % 4], 1e-5)

    assert 1 == backend.graphs


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
def test_compiled_code_does_not_run_on_for_a_thread_with_other_adapters():
    """It cannot see them: with fullgraph it refuses, without it leaves the graph there."""
    model = make()
    base = model.get_base_model()
    expected = logits(model, adapter_names=NAMES)
    whole = torch.compile(base, fullgraph=True, backend="eager")
    broken = torch.compile(base, backend="eager")
    with torch.no_grad():
        before = whole(IDS).logits
        assert close(before, logits(model), 1e-5)
        with model.activated(NAMES):
            with pytest.raises(Exception, match="it would not see which variants"):
                whole(IDS)
            assert close(broken(IDS).logits, expected, 1e-5)
        assert torch.equal(before, whole(IDS).logits)


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
# Dynamo looks at intermediate tensors where transformers' forward breaks the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_training_with_checkpointing_compiles():
    model = make()
    model.train()
    model.activation_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    gate = model.adapter_modules("fr")["model.layers.2.self_attn"].adaption_gate
    expected, gate.grad = gate.grad, None
    compiled = torch.compile(model.get_base_model(), backend="aot_eager")

    compiled(IDS, labels=IDS).loss.backward()

    assert close(gate.grad, expected, 1e-5)


def test_a_copy_of_a_model_with_open_buffers_is_complete():
    model = make()
    with model.fixed_rows(4) as rows:
        rows.assign(NAMES)
        expected = logits(model)
        assert torch.equal(expected, logits(copy.deepcopy(model)))


def test_buffers_follow_the_model():
    model = make()
    with model.fixed_rows(4) as rows:
        model.double()
        rows.assign(NAMES)
        expected = logits(model)
    assert torch.float64 is expected.dtype
    assert close(expected, logits(model, adapter_names=NAMES), 1e-14)


def test_another_adapter_may_be_activated_inside():
    model = make()
    with model.fixed_rows(4) as rows:
        rows.assign(NAMES)
        model.set_adapter("legal")
        expected = logits(model)
    assert "legal" == model.active_adapter
    assert torch.equal(expected, logits(model))


def test_what_was_active_is_in_use_meanwhile():
    model = make()
    with model.fixed_rows(4):
        assert "fr" == model.active_adapter
        with pytest.raises(VariantError, match="Adapter 'fr' is in use by what is active"):
            model.delete_adapter("fr")
        for call in (lambda: model.fixed_rows(2).__enter__(), model.merge_adapter):
            with pytest.raises(OptionsError, match="composition, got fixed rows"):
                call()
        model.delete_adapter("legal")
    assert "fr" == model.swap_state.active


def test_what_there_is_no_room_for_is_refused_and_changes_nothing():
    model = make()
    with model.fixed_rows(4, adapter_len=3) as rows:
        rows.assign(["fr"])
        expected = logits(model)
        for names, kind, message in (
            (["fr"] * 5, OptionsError, r"adapter_names has 5 names: expected 1 to max_rows=4"),
            ([], OptionsError, r"adapter_names has 0 names"),
            (["fr", "legal"], OptionsError, r"Prompt has 5 tokens: expected at most adapter_len=3"),
            (["nobody"], VariantError, r"Adapter 'nobody' does not exist"),
        ):
            with pytest.raises(kind, match=message):
                rows.assign(names)
        assert torch.equal(expected, logits(model))
        with pytest.raises(OptionsError, match="Batch has 5 rows: expected at most max_rows=4"):
            model(tokens(5))


@pytest.mark.parametrize(
    ("prepare", "sizes", "message"),
    [
        (lambda _: None, (0, None), r"sizes of at least 1, got max_rows=0, adapter_len=5"),
        (lambda _: None, (1, 0), r"sizes of at least 1, got max_rows=1, adapter_len=0"),
        (
            lambda m: m.disable_adapter_layers(),
            (1, None),
            r"expected enabled adapters, got disabled",
        ),
        (
            lambda m: [m.delete_adapter(name) for name in CONFIGS],
            (1, None),
            r"fixed_rows has nothing to work on: expected enabled adapters, got none",
        ),
    ],
)
def test_buffers_that_cannot_be_are_refused(prepare, sizes, message):
    model = make()
    prepare(model)
    with (
        pytest.raises(OptionsError, match=message),
        model.fixed_rows(sizes[0], adapter_len=sizes[1]),
    ):
        pytest.fail("never entered")
