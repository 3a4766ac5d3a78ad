"""A plan says what would change, refuses what does not fit, and touches nothing."""

import json

import pytest
import torch
from core.toys import Block, Fresh, Gate, Net, Shift, Twice, session
from torch import nn

from surgery_core import (
    BoundRule,
    ConflictError,
    ContractError,
    Edit,
    Exact,
    NoMatchError,
    OptionsError,
    PlanDocument,
    Rule,
    TensorSpec,
    fingerprint,
)
from surgery_core.plan import draft
from surgery_core.testing import assert_unchanged, snapshot


def gate(select=None, **more):
    return Rule(operation="gate", select=select, **more)


def anything(select, **more):
    return gate(select, options={"anything": True}, **more)


def shift(select=None, **more):
    return Rule(operation="shift", select=select, **more)


def fqns(model, *rules):
    return [edit.fqn for edit in session().plan(model, rules).document.edits]


def refusal(error, *rules, model=None):
    """Return the error of planning, after a check that it changed nothing."""
    model = model or Net()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        session().plan(model, rules)
    assert_unchanged(before, model, subject="Planning that failed")
    return caught.value


def test_edits_are_in_the_order_of_rules_then_of_the_tree():
    assert fqns(Net(), shift("head"), gate("layers.{..0}.*")) == [
        "head",
        "layers.0.up",
        "layers.0.down",
    ]


def test_the_order_of_rules_decides_and_not_the_alphabet():
    assert fqns(Net(), gate("stem"), shift("head")) == ["stem", "head"]
    assert fqns(Net(), shift("head"), gate("stem")) == ["head", "stem"]


def test_without_a_selector_the_operation_looks_everywhere():
    assert len(fqns(Net(), gate())) == 8


def test_a_selector_object_is_as_good_as_its_text():
    assert fqns(Net(), gate(Exact("head"))) == fqns(Net(), gate("head"))


def test_an_edit_is_plain_data():
    model = Net()

    document = session().plan(model, [shift("head")]).document

    assert document.fingerprint == fingerprint(model)
    assert document.edits == (
        Edit(
            rule=0,
            operation="shift",
            fqn="head",
            aliases=(),
            module="torch.nn.modules.linear.Linear",
            added=(TensorSpec(name="shift", shape=(2,), dtype="float32", trainable=True),),
            removed=(),
        ),
    )
    assert document.num_parameters == 2


def test_an_alias_is_one_edit_from_either_fqn():
    model = Twice(nn.Linear(2, 2))

    by_first = session().plan(model, [gate("first")]).document
    by_second = session().plan(model, [gate("second")]).document

    assert by_first == by_second
    assert by_first.edits[0].fqn == "first"
    assert by_first.edits[0].aliases == ("second",)


def test_a_selector_without_a_match_names_the_closest_fqns():
    error = refusal(NoMatchError, shift("head"), gate("layers.1.upp"))

    assert str(error) == (
        "Rule 1 ('gate'): selector 'layers.1.upp' matched none of 16 submodules. Closest FQN: "
        "'layers.1.up', 'layers.2.up', 'layers.0.up'. Fix the pattern, or mark the rule as "
        "optional."
    )
    assert error.selector == "layers.1.upp"
    assert error.candidates == ("layers.1.up", "layers.2.up", "layers.0.up")


def test_a_selector_like_nothing_suggests_nothing():
    error = refusal(NoMatchError, gate("zzz"))

    assert str(error) == (
        "Rule 0 ('gate'): selector 'zzz' matched none of 16 submodules. Fix the pattern, or mark "
        "the rule as optional."
    )
    assert error.candidates == ()


def test_a_selector_without_a_target_is_an_error():
    error = refusal(NoMatchError, gate("layers.*.norm"))

    assert str(error) == (
        "Rule 0 ('gate'): target 'class:torch.nn.modules.linear:Linear' matched none of 3 "
        "submodules. Fix the pattern, or mark the rule as optional."
    )


def test_of_several_selectors_each_must_match():
    """One that is misspelt is not missed because of the others."""
    found = session().plan(Net(), [Rule(operation="shift", select=["head", "layers.0.*"])])
    assert ["layers.0.up", "layers.0.down", "head"] == [e.fqn for e in found.document.edits]
    for several in (["head", "layer.0.up"], (Exact("head"), Exact("layer.0.up"))):
        with pytest.raises(NoMatchError) as caught:
            session().plan(Net(), [Rule(operation="shift", select=several)])
        assert str(caught.value).startswith(
            "Rule 0 ('shift'): selector 'layer.0.up' matched none of 16 submodules. Closest FQN: "
            "'layers.0.up'"
        )
    assert (
        not session()
        .plan(Net(), [Rule(operation="shift", select=["zzz"], optional=True)])
        .document.edits
    )


def test_a_selector_without_any_target_is_refused_though_others_have_some():
    error = refusal(NoMatchError, shift(["head", "layers.0.norm"]))

    assert (
        "Rule 0 ('shift'): selector 'layers.0.norm' matches 'layers.0.norm': expected a target of the "
        "operation among them, got none."
    ) in str(error)
    assert "layers.0.norm" == error.selector
    assert ["head"] == list(error.candidates)
    assert ["head"] == fqns(Net(), shift(["head", "layers.0.norm"], optional=True))


def test_of_several_exclusions_each_must_exclude():
    found = session().plan(Net(), [Rule(operation="shift", exclude=["layers.**", "head"])]).document
    assert ["stem"] == [edit.fqn for edit in found.edits]
    with pytest.raises(NoMatchError, match=r"exclude 'layers\.7\.up' matched none"):
        session().plan(Net(), [Rule(operation="shift", exclude=["head", "layers.7.up"])])


def test_an_exclusion_leaves_modules_out():
    assert fqns(Net(), gate(exclude="layers.**")) == ["stem", "head"]
    assert fqns(Net(), gate("layers.**", exclude=~Exact("layers.2.up"))) == ["layers.2.up"]


def test_an_exclusion_that_excludes_nothing_is_an_error():
    error = refusal(NoMatchError, gate("layers.**", exclude="head"))

    assert str(error) == (
        "Rule 0 ('gate'): exclude 'head' matched none of 16 submodules. Closest FQN: 'head'. "
        "Fix the pattern, or mark the rule as optional."
    )


def test_an_exclusion_by_any_alias_excludes_the_module():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["c"] = model["a"]

    assert fqns(model, gate("[ac]", exclude="c", optional=True)) == []
    assert fqns(model, gate("[ab]", exclude="c")) == ["b"]


def test_a_rule_whose_targets_are_all_excluded_is_an_error():
    error = refusal(ContractError, gate("head", exclude="head"))

    assert str(error) == (
        "Rule 0 ('gate') expected at least 1 modules, got 0: nothing. Change the selector or "
        "`expect`."
    )


def test_an_unmet_expectation_is_an_error():
    error = refusal(ContractError, gate("layers.*.up", expect=2))

    assert str(error) == (
        "Rule 0 ('gate') expected 2 modules, got 3: 'layers.0.up', 'layers.1.up', "
        "'layers.2.up'. Change the selector or `expect`."
    )
    assert (error.fqn, error.expected, error.actual) == ("", 2, 3)


def test_a_met_expectation_is_none():
    assert len(fqns(Net(), gate("layers.*.up", expect=3))) == 3
    assert fqns(Net(), gate("head", exclude="head", expect=0)) == []


@pytest.mark.parametrize("expect", [None, 3])
@pytest.mark.parametrize(
    "where",
    [
        {"select": "zzz"},
        {"select": "layers.*.norm"},
        {"select": "head", "exclude": "head"},
    ],
)
def test_an_optional_rule_may_claim_nothing(where, expect):
    assert fqns(Net(), gate(**where, optional=True, expect=expect)) == []


def test_an_optional_rule_that_claims_something_keeps_its_expectation():
    refusal(ContractError, gate("head", optional=True, expect=3))


def test_an_optional_exclusion_may_exclude_nothing():
    assert fqns(Net(), gate("head", exclude="zzz", optional=True)) == ["head"]


def test_options_the_operation_does_not_know_are_refused():
    error = refusal(OptionsError, gate(options={"valeu": 1}))

    assert str(error) == "Operation 'gate' does not know ['valeu']."


def test_two_claims_on_one_module_conflict():
    error = refusal(ConflictError, gate("head"), shift("head"))

    assert str(error) == (
        "Operations conflict: 'gate' (rule 0) claims 'head' and 'shift' (rule 1) claims 'head'. "
        "Narrow their selectors so that they are disjoint."
    )
    assert error.claims == ((("gate", "head"), ("shift", "head")),)


def test_a_claim_inside_another_conflicts_whichever_comes_first():
    inside = refusal(ConflictError, anything("layers.1"), shift("layers.1.up"))
    around = refusal(ConflictError, shift("layers.1.up"), anything("layers.1"))

    assert str(inside) == (
        "Operations conflict: 'gate' (rule 0) claims 'layers.1' and 'shift' (rule 1) claims "
        "'layers.1.up'. Narrow their selectors so that they are disjoint."
    )
    assert str(around) == (
        "Operations conflict: 'gate' (rule 1) claims 'layers.1' and 'shift' (rule 0) claims "
        "'layers.1.up'. Narrow their selectors so that they are disjoint."
    )


def test_the_root_conflicts_with_everything_below():
    error = refusal(ConflictError, anything(""), shift("head"))
    twice = refusal(ConflictError, anything(""), anything(""))

    assert error.claims == ((("gate", ""), ("shift", "head")),)
    assert str(twice) == (
        "Operations conflict: 'gate' (rule 0) claims '(root)' and 'gate' (rule 1) claims "
        "'(root)'. Narrow their selectors so that they are disjoint."
    )


def test_a_conflict_is_found_by_an_alias():
    shared = Block()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})

    error = refusal(ConflictError, anything("b"), shift("a.up"), model=model)

    assert error.claims == ((("gate", "b"), ("shift", "b.c.up")),)


def test_many_conflicts_are_counted():
    error = refusal(ConflictError, gate(), shift())

    assert len(error.claims) == 8
    assert str(error).endswith(
        "'gate' (rule 0) claims 'layers.1.down' and 'shift' (rule 1) claims 'layers.1.down'; "
        "and 3 more. Narrow their selectors so that they are disjoint."
    )


def test_neighbours_with_a_common_prefix_do_not_conflict():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "ab": nn.Linear(1, 1)})

    assert fqns(model, gate("a"), shift("ab")) == ["a", "ab"]


def test_an_operation_refuses_a_module_that_does_not_suit_it():
    bound = [BoundRule(rule=Rule(operation="shift"), operation=Anywhere())]

    with pytest.raises(ContractError, match=r"\AModule at '' cannot be shifted\.\Z"):
        draft(nn.ReLU(), bound)


class Anywhere(Shift):
    def targets(self, _tree, _options):
        return Exact("")


def test_the_fingerprint_is_of_structure_alone():
    model = Net()
    before = fingerprint(model)
    assert fingerprint(Net()) == before

    with torch.no_grad():
        model.head.weight.add_(1)
    model.eval().requires_grad_(requires_grad=False)
    assert fingerprint(model) == before
    assert fingerprint(model.double()) != before
    assert fingerprint(Net(blocks=2)) != before
    assert fingerprint(Net(3)) != before


@pytest.mark.parametrize("change", ["class", "name", "buffer"])
def test_the_fingerprint_changes_with(change):
    one, two = nn.Module(), nn.Module()
    one.a = nn.ReLU()
    setattr(two, "b" if change == "name" else "a", nn.Tanh() if change == "class" else nn.ReLU())
    if change == "buffer":
        two.register_buffer("extra", torch.zeros(1))
        one.register_buffer("extra", None)

    assert fingerprint(one) != fingerprint(two)


def test_json_reads_back_equal():
    document = session().plan(Twice(Net()), [gate(), shift("zzz", optional=True)]).document

    text = document.to_json()

    assert PlanDocument.from_json(text) == document
    assert list(json.loads(text)) == ["edits", "fingerprint"]
    assert json.loads(text)["edits"][0]["aliases"] == ["second.stem"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "JSONDecodeError("),
        ("[]", "TypeError("),
        ("{}", "KeyError('fingerprint')"),
        ('{"fingerprint": "0", "edits": [{}]}', "KeyError('aliases')"),
    ],
)
def test_text_that_is_no_plan_is_refused(text, cause):
    with pytest.raises(ContractError) as caught:
        PlanDocument.from_json(text)

    expected = f"Text is not a plan: expected what PlanDocument.to_json() writes, got {cause}"
    assert str(caught.value).startswith(expected)
    assert caught.value.actual == text


def test_a_plan_is_a_table():
    rules = [shift("head"), Rule(operation="fresh", select="stem")]

    assert str(session().plan(Net(), rules)).splitlines() == [
        "module  class   operation  adds",
        "------  ------  ---------  -----------------",
        "head    Linear  shift      shift [2] float32",
        "stem    Linear  fresh      no tensors",
        "Plan: 2 modules replaced, 2 parameters added.",
    ]


def test_the_table_names_the_root_and_what_is_removed():
    table = session().plan(nn.Linear(30, 50, bias=False), [gate()]).document.render()

    assert table.splitlines()[2:] == [
        "(root)  Linear  gate       gate [1] float32, inner.weight [50, 30] float32, -weight",
        "Plan: 1 module replaced, 1,501 parameters added.",
    ]


def test_a_plan_for_nothing_says_so():
    assert str(session().plan(Net(), [gate("zzz", optional=True)])) == "No changes."


def test_operations_are_bound_to_rules_without_a_session():
    rules = [
        BoundRule(rule=gate("stem"), operation=Gate()),
        BoundRule(rule=Rule(operation="fresh", select="head"), operation=Fresh()),
    ]

    claims, document = draft(Net(), rules)

    assert [claim.site.fqn for claim in claims] == ["stem", "head"]
    assert [edit.rule for edit in document.edits] == [0, 1]
