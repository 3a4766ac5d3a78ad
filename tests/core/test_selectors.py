"""Selectors choose FQNs, say what they are, and refuse what is malformed."""

import sys
import types

import pytest
import torch
from core.toys import Net
from torch import nn

from surgery_core import (
    Exact,
    Glob,
    OfClass,
    Regex,
    SelectorError,
    SlotIndex,
    Where,
    parse_selector,
)
from surgery_core.selectors import closest


def tree_of(*fqns):
    return dict.fromkeys(("", *fqns), nn.Identity())


def layers(count, *, leaf=""):
    return tree_of(*(f"layers.{i}{leaf}" for i in range(count)))


class Quiet(nn.Linear):
    """A subclass with the forward of its base."""


class Loud(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.1", {"layers.1"}),
        ("layers.1.*", {"layers.1.up"}),
        ("layers.1*", {"layers.1", "layers.10"}),
        ("*", {"layers", "head"}),
        ("layers.*", {"layers.0", "layers.1", "layers.10"}),
        ("layers.?", {"layers.0", "layers.1"}),
        ("layers.[01]", {"layers.0", "layers.1"}),
        ("**.up", {"layers.0.up", "layers.1.up", "layers.10.up"}),
        ("**.layers.0.**", {"layers.0", "layers.0.up"}),
        ("layers.{1..}", {"layers.1", "layers.10"}),
        ("layers.{..1}", {"layers.0", "layers.1"}),
        ("layers.{-2..}", {"layers.1", "layers.10"}),
        ("layers.{..-2}", {"layers.0", "layers.1"}),
        ("layers.{-3..-3}.up", {"layers.0.up"}),
        ("layers.{..}", {"layers.0", "layers.1", "layers.10"}),
        ("{0..}", set()),
        ("up", set()),
        ("layers.1.up.more", set()),
    ],
)
def test_globs_go_by_segments(pattern, expected):
    tree = tree_of(
        *("layers", "layers.0", "layers.0.up", "layers.1", "layers.1.up"),
        *("layers.10", "layers.10.up", "head"),
    )

    assert Glob(pattern).select(tree) == expected


def test_two_stars_leave_out_the_root():
    assert Glob("**").select(tree_of("a")) == {"a"}


def test_negative_bounds_count_from_the_last_sibling_of_the_same_parent():
    tree = tree_of("a.0", "a.1", "a.2", "b.0", "b.1")

    assert Glob("*.{-1..}").select(tree) == {"a.2", "b.1"}


def test_more_than_there_are_from_the_end_is_all_of_them():
    assert Glob("layers.{-9..}").select(layers(3)) == {"layers.0", "layers.1", "layers.2"}


def test_up_to_before_the_first_is_none_of_them():
    """As in `list(range(3))[: -9 + 1]`, which is empty."""
    assert Glob("layers.{..-4}").select(layers(3)) == frozenset()
    assert Glob("layers.{..-3}").select(layers(3)) == {"layers.0"}


def test_siblings_are_counted_where_the_tree_holds_only_their_children():
    """An operation is offered only what the rule selected."""
    tree = layers(4, leaf=".attn")

    assert Glob("layers.{-2..}.attn").select(tree) == {"layers.2.attn", "layers.3.attn"}


def test_a_malformed_range_is_refused():
    with pytest.raises(SelectorError) as caught:
        Glob("layers.{1-3}.attn")

    assert str(caught.value) == (
        "Selector 'layers.{1-3}.attn' is malformed: expected ranges as {a..b}, got "
        "'layers.{1-3}.attn' besides them. Write for example 'layers.{-8..}.self_attn'."
    )


def test_exact_takes_one_fqn():
    assert Exact("a.b").select(tree_of("a", "a.b")) == {"a.b"}
    assert Exact("").select(tree_of("a")) == {""}
    assert Exact("b").select(tree_of("a")) == frozenset()
    assert Exact("odd*name").select(tree_of("odd*name", "oddname")) == {"odd*name"}


def test_regular_expressions_match_in_full():
    tree = tree_of("layers.1", "layers.10")

    assert Regex(r"layers\.\d").select(tree) == {"layers.1"}
    assert Regex(".*").select(tree) == {"", "layers.1", "layers.10"}


def test_a_malformed_regular_expression_is_refused():
    with pytest.raises(SelectorError) as caught:
        Regex("(a")

    assert str(caught.value) == (
        "Selector 'regex:(a' is malformed: missing ), unterminated subpattern at position 0."
    )
    with pytest.raises(SelectorError, match=r"'regex:\[\[a-z\]' is malformed: Possible nested set"):
        Regex("[[a-z]")


def test_a_class_takes_subclasses_that_keep_its_forward():
    tree = {"plain": nn.Linear(1, 1), "quiet": Quiet(1, 1), "loud": Loud(1, 1), "other": nn.ReLU()}

    assert OfClass(nn.Linear).select(tree) == {"plain", "quiet"}
    assert OfClass(nn.Linear, exact=True).select(tree) == {"plain"}
    assert OfClass(nn.Linear, overridden=True).select(tree) == {"plain", "quiet", "loud"}
    assert OfClass(Loud).select(tree) == {"loud"}


def test_where_asks_a_predicate():
    tree = {"a": nn.ReLU(), "b": nn.Tanh()}

    chosen = Where(lambda fqn, module: fqn == "b" and isinstance(module, nn.Tanh)).select(tree)

    assert chosen == {"b"}


def test_selectors_combine():
    tree = tree_of("a", "b", "c")
    both = Glob("[ab]") & Glob("[bc]")
    either = Exact("a") | Exact("c")

    assert both.select(tree) == {"b"}
    assert either.select(tree) == {"a", "c"}
    assert (~either).select(tree) == {"", "b"}
    assert str(~(both | Exact("c"))) == "~(([ab] & [bc]) | c)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.norm", Exact("model.norm")),
        ("", Exact("")),
        ("a.*", Glob("a.*")),
        ("a.?", Glob("a.?")),
        ("a.[0-3]", Glob("a.[0-3]")),
        ("a.{0..3}", Glob("a.{0..3}")),
        (r"regex:a\.\d+", Regex(r"a\.\d+")),
        ("class:torch.nn:Linear", OfClass(nn.Linear)),
    ],
)
def test_text_is_read_by_its_form(text, expected):
    assert parse_selector(text) == expected


@pytest.mark.parametrize(
    "selector", [Exact("a"), Glob("a.{-1..}"), Regex("a+"), OfClass(nn.Linear)]
)
def test_text_of_a_selector_reads_back_as_the_selector(selector):
    assert parse_selector(str(selector)) == selector


def test_predicates_are_named_by_their_description():
    assert str(Where(lambda _fqn, _module: True)) == "where(...)"
    assert str(Where(lambda _fqn, _module: True, "the top 3")) == "the top 3"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (
            "no_such_package:Linear",
            "a class of 'no_such_package', which is not imported: expected a module that the model "
            "is made of. Write 'class:package.module:ClassName', or import it first.",
        ),
        (
            "torch.nn:Lineal",
            "no class: module 'torch.nn' has no attribute 'Lineal'. Write "
            "'class:package.module:ClassName'.",
        ),
        (
            ":Linear",
            "a class of '', which is not imported: expected a module that the model is made of. "
            "Write 'class:package.module:ClassName', or import it first.",
        ),
    ],
)
def test_a_class_that_is_not_there_is_refused(path, reason):
    with pytest.raises(SelectorError) as caught:
        parse_selector(f"class:{path}")

    assert f"Selector 'class:{path}' names {reason}" == str(caught.value)


def test_a_selector_imports_nothing(tmp_path, monkeypatch):
    """Recipes and records come from others, and a module runs as it is imported."""
    (tmp_path / "not_imported.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(SelectorError, match="'not_imported', which is not imported"):
        parse_selector("class:not_imported:Linear")


def test_a_selector_does_not_make_a_module_import_what_it_has_not_yet(monkeypatch):
    """Packages such as transformers import their modules when a name of theirs is asked for."""
    lazy = types.ModuleType("lazy")
    asked = []
    lazy.__getattr__ = asked.append
    monkeypatch.setitem(sys.modules, "lazy", lazy)

    with pytest.raises(SelectorError, match="module 'lazy' has no attribute 'Linear'"):
        parse_selector("class:lazy:Linear")

    assert [] == asked
    lazy.Linear = nn.Linear
    assert nn.Linear is parse_selector("class:lazy:Linear").cls


@pytest.mark.parametrize(
    ("path", "found"), [("torch:Tensor", torch.Tensor), ("torch.nn.functional:relu", None)]
)
def test_a_class_must_be_one_of_modules(path, found):
    with pytest.raises(SelectorError) as caught:
        parse_selector(f"class:{path}")

    assert str(caught.value) == (
        f"Selector 'class:{path}' names {found or nn.functional.relu!r}: "
        "expected a subclass of torch.nn.Module."
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers.0.upp", ["layers.0.up", "layers.2.up", "layers.1.up"]),
        ("layers.*.norms", ["layers.0.norm"]),
        ("regex:layers.{..3}.dwn", ["layers.0.down"]),
        ("zzz", []),
        ("stm", ["stem"]),
    ],
)
def test_the_closest_fqns_are_suggested(text, expected):
    found = closest(text, SlotIndex(Net()).modules)

    assert found[: len(expected)] == expected
    assert len(found) <= 3
    if not expected:
        assert found == []


def test_choosing_changes_nothing():
    tree = SlotIndex(Net()).modules
    before = dict(tree)

    for selector in (Glob("**"), Regex(".*"), ~Exact("stem"), OfClass(nn.Linear)):
        selector.select(tree)

    assert tree == before
    assert list(tree) == list(before)
