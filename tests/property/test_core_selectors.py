"""On any set of FQNs: selectors obey the laws of sets, and their text says what they are."""

import re

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from surgery_core import Exact, Glob, Regex, Where, parse_selector
from surgery_core.selectors import closest

segments = st.sampled_from(["layers", "attn", "0", "1", "2", "10", "a-b", "up"])
fqns = st.lists(segments, min_size=1, max_size=4).map(".".join)
trees = st.lists(fqns, max_size=12).map(lambda names: dict.fromkeys(["", *names], nn.Identity()))
patterns = st.lists(
    st.one_of(segments, st.sampled_from(["*", "**", "?", "{0..}", "{-2..}", "{..-2}", "{1..10}"])),
    min_size=1,
    max_size=4,
).map(".".join)
selectors = st.one_of(
    fqns.map(Exact),
    patterns.filter(lambda text: set(text) & set("*?{")).map(Glob),
    st.sampled_from([r"layers\..*", ".*", r".*\d+"]).map(Regex),
)


@given(tree=trees, one=selectors, two=selectors)
def test_selectors_are_an_algebra_of_sets(tree, one, two):
    a, b = one.select(tree), two.select(tree)

    assert a <= tree.keys()
    assert (one & two).select(tree) == a & b
    assert (one | two).select(tree) == a | b
    assert (~one).select(tree) == tree.keys() - a
    assert (~~one).select(tree) == a
    assert (~(one & two)).select(tree) == (~one | ~two).select(tree)


@given(selector=selectors)
def test_text_reads_back_as_the_selector(selector):
    assert parse_selector(str(selector)) == selector


@given(tree=trees, fqn=fqns)
def test_a_glob_without_wildcards_is_exact(tree, fqn):
    assert Glob(fqn).select(tree) == Exact(fqn).select(tree)


@given(tree=trees, pattern=patterns.filter(lambda text: "{" not in text))
def test_a_glob_agrees_with_a_regular_expression(tree, pattern):
    """Every segment takes its dot along, so that two stars can stand for none."""
    parts = {"**": r"([^.]+\.)*", "*": r"[^.]*\.", "?": r"[^.]\."}
    written = "".join(parts.get(part, re.escape(part) + r"\.") for part in pattern.split("."))
    expected = {fqn for fqn in tree if fqn and re.fullmatch(written, f"{fqn}.")}

    assert Glob(pattern).select(tree) == expected


@given(count=st.integers(1, 12), low=st.integers(-15, 15), high=st.integers(-15, 15))
def test_a_range_is_a_slice_that_includes_its_end(count, low, high):
    tree = {f"layers.{i}.attn": nn.Identity() for i in range(count)}
    stop = high + 1 or None if high < 0 else high + 1
    start = low if low >= 0 else max(count + low, 0)
    expected = {f"layers.{i}.attn" for i in range(count)[start:stop]}
    if high < 0 and count + high < 0:
        expected = set()

    assert Glob(f"layers.{{{low}..{high}}}.attn").select(tree) == expected


@given(tree=trees, text=st.one_of(patterns, fqns))
def test_suggestions_are_names_of_the_tree(tree, text):
    found = closest(text, tree)

    assert len(found) <= 3
    assert set(found) <= set(tree) - {""}
    if text in tree:
        assert found[0] == text


@given(tree=trees)
def test_a_predicate_sees_every_module_once(tree):
    seen = []

    Where(lambda fqn, _: bool(seen.append(fqn))).select(tree)

    assert seen == list(tree)
