"""Variables become values and recipes are laid over those they extend; lines stay those of the files."""

import json
from pathlib import Path

import pytest

from surgery_core import RecipeError
from surgery_core.recipe_document import did_you_mean, escaped, read_recipe_document


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes files by name, in a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)

    def write_files(**files):
        for name, text in files.items():
            path = Path(f"{name.replace('__', '/')}.yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    return write_files


def data_of(name="a.yaml", **variables):
    return read_recipe_document(Path(name), variables).data


def refusal(name="a.yaml", **variables):
    with pytest.raises(RecipeError) as caught:
        read_recipe_document(Path(name), variables)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value


def test_a_variable_alone_keeps_its_type(write):
    write(
        a="variables: {n: 5, x: 1e-3, b: true, none: null, text: t, lazy: '5'}\n"
        "a: ['${n}', '${x}', '${b}', '${none}', '${text}', '${lazy}']"
    )

    assert {"a": [5, 0.001, True, None, "t", "5"]} == data_of()


def test_a_variable_inside_text_is_written_as_in_recipes(write):
    write(
        a="variables: {n: 5, x: 1e-3, b: true, none: null, text: t}\n"
        "a: '<${n}|${x}|${b}|${none}|${text}${text}>'\n"
        "b: {c: ['${n} ', {d: ' ${n}'}]}"
    )

    assert {"a": "<5|0.001|true|null|tt>", "b": {"c": ["5 ", {"d": " 5"}]}} == data_of()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$$", "$"),
        ("a$$b", "a$b"),
        ("$${n}", "${n}"),
        ("$$${n}", "$5"),
        ("$$$$", "$$"),
        ("regex:.*proj$", "regex:.*proj$"),
        ("$n", "$n"),
        ("a$", "a$"),
        ("{n}", "{n}"),
    ],
)
def test_two_dollar_signs_are_one_and_one_without_braces_is_itself(write, text, expected):
    write(a=f"variables: {{n: 5}}\na: '{text}'")

    assert {"a": expected} == data_of()


def test_variables_stand_for_values_and_not_for_keys(write):
    write(a="variables: {n: 5}\n'${n}': '${n}'")

    assert {"${n}": 5} == data_of()


def test_the_value_of_a_variable_is_put_in_as_it_is(write, monkeypatch):
    """Otherwise somebody else's dollar sign would begin a variable."""
    monkeypatch.setenv("MONEY", "$$ and ${n}")
    write(a="variables: {n: 5, m: x}\na: ['${m}', 'a ${m}', '${env:MONEY}', 'a ${env:MONEY}']")

    assert {"a": ["${n}$$", "a ${n}$$", "$$ and ${n}", "a $$ and ${n}"]} == data_of(m="${n}$$")


def test_variables_may_be_made_of_those_further_up_and_of_the_environment(write, monkeypatch):
    monkeypatch.setenv("ROOT_OF_ALL", "/data")
    write(
        a="variables: {root: '${env:ROOT_OF_ALL}/x', n: 5, m: '${n}', path: '${root}/${m}$$'}\n"
        "a: ['${path}', '${m}']"
    )

    assert {"a": ["/data/x/5$", 5]} == data_of()
    assert {"a": ["/data/x/7$", 7]} == data_of(n="7")


def test_variables_of_the_environment_are_text(write, monkeypatch):
    monkeypatch.setenv("NUMBER", "5")
    monkeypatch.setenv("EMPTY", "")
    write(a="a: ['${env:NUMBER}', '${env:EMPTY}']")

    assert {"a": ["5", ""]} == data_of()


def test_values_that_are_given_replace_those_of_the_file_and_are_read_as_scalars(write):
    write(a="variables: {a: 1, b: 2, c: 3, d: 4}\nx: ['${a}', '${b}', '${c}', '${d}']")

    assert {"x": [8, "layers.*", "8", ""]} == data_of(a="8", b="layers.*", c="'8'", d="")


def test_no_variables_are_none(write):
    write(a="variables:\na: 1", b="variables: {}\na: 1")

    assert {"a": 1} == data_of()
    assert {"a": 1} == data_of("b.yaml")


def test_every_variable_without_a_value_is_named_with_its_line(write, monkeypatch):
    monkeypatch.delenv("NOT_THERE", raising=False)
    write(
        a="variables:\n"
        "  length: 5\n"
        "  later: '${last}'\n"
        "  last: 1\n"
        "a:\n"
        "  - '${lenght}'\n"
        "  - b: 'x ${zzz} ${length}'\n"
        "  - ['${env:NOT_THERE}', '${}', '${open', '${ length }']\n"
    )

    assert (
        "a.yaml:3: variables.later: no variable 'last' further up, and $$ is a dollar sign",
        "a.yaml:6: a[0]: no variable 'lenght': did you mean 'length'?",
        "a.yaml:7: a[1].b: no variable 'zzz', and $$ is a dollar sign",
        "a.yaml:8: a[2][0]: no environment variable 'NOT_THERE'",
        "a.yaml:8: a[2][1]: no variable '', and $$ is a dollar sign",
        "a.yaml:8: a[2][2]: '${' begins a variable that does not end, and $$ is a dollar sign",
        "a.yaml:8: a[2][3]: no variable ' length ': did you mean 'length'?",
    ) == refusal().problems


def test_variables_must_be_names_with_single_values(write):
    write(a="variables: [a]\nx: 1", b="\nvariables:\n  a: [1]\n  b: {c: 1}\nx: 1")

    assert "a.yaml:1: variables: expected names with values, got ['a']" == str(refusal())
    assert (
        "b.yaml:3: variables.a: expected a single value, got [1]",
        "b.yaml:4: variables.b: expected a single value, got {'c': 1}",
    ) == refusal("b.yaml").problems


def test_given_variables_must_be_among_those_of_the_file_and_be_values(write):
    write(a="variables: {length: 5, width: 6}\na: 1", b="a: 1")

    assert (
        "a.yaml: no variable 'lenght': did you mean 'length'?",
        "a.yaml: no variable 'zzz': expected one of 'length', 'width'",
        "variable 'width' is no value: while scanning a quoted scalar, found unexpected end of "
        'stream, got "\'6"',
    ) == refusal(zzz="1", lenght="1", width="'6").problems
    assert "b.yaml: no variable 'x': expected one of nothing" == str(refusal("b.yaml", x="1"))


def test_what_was_escaped_is_what_it_was_once_variables_are_put_in(write):
    data = {"a": ["$", "$$", "${n}", "x${env:Y}", 5, None], "b": {"$$": "regex:x$"}}
    write()
    Path("a.json").write_text(json.dumps(escaped(data)), encoding="utf-8")

    assert data == data_of("a.json")


def test_a_recipe_is_laid_over_the_one_it_extends(write):
    write(
        base="variables: {n: 1}\na: {b: '${n}', c: [1, 2]}\nd: 1",
        a="extends: base.yaml\nvariables: {n: 2}\na: {c: [3]}\n",
    )

    assert {"a": {"b": 2, "c": [3]}, "d": 1} == data_of()


def test_of_several_the_later_goes_before_the_earlier_and_the_recipe_before_both(write):
    write(
        one="a: 1\nb: 1\nc: 1\n",
        two="b: 2\nc: 2\n",
        a="extends: [one.yaml, two.yaml]\nc: 3\n",
    )

    assert {"a": 1, "b": 2, "c": 3} == data_of()


def test_formats_may_be_mixed_and_one_file_extended_twice(write):
    write(
        left="extends: base.toml\nb: {c: 2}",
        right="extends: base.toml\nd: 3",
        a="extends: [left.yaml, right.yaml]",
    )
    Path("base.toml").write_text("[b]\na = 1\n", encoding="utf-8")

    assert {"b": {"a": 1, "c": 2}, "d": 3} == data_of()


def test_paths_are_relative_to_the_file_they_are_in(write, tmp_path):
    write(
        a="extends: sub/b.yaml\na: 1",
        sub__b="extends: ['../c.yaml', deep/d.yaml]\nb: 1",
        c="c: 1",
        sub__deep__d=f"extends: {tmp_path}/e.yaml\nd: 1",
        e="e: 1",
    )

    assert dict.fromkeys("abcde", 1) == data_of()
    assert dict.fromkeys("abcde", 1) == data_of(tmp_path / "a.yaml")


def test_a_path_may_begin_at_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(a="extends: ~/b.yaml", home__b="models: {m: {source: ./c}}")

    assert {"models": {"m": {"source": "~/./c"}}} == data_of()


SOURCES = """
models:
  one:
    source: ./model
    adapters: {a: {source: ../a}, b: {source: org/b}, c: {source: .}, d: 5}
  two: {source: '${dir}/x', adapters: [1]}
  three: 5
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("base", ["./model", "../a", "."]),
        ("./base", ["./model", "../a", "."]),
        ("sub/base", ["./sub/./model", "./sub/../a", "./sub/."]),
        ("sub/../sub/base", ["./sub/../sub/./model", "./sub/../sub/../a", "./sub/../sub/."]),
        ("../base", [".././model", "../../a", "../."]),
        ("$x/base", ["./$x/./model", "./$x/../a", "./$x/."]),
    ],
)
def test_sources_of_a_recipe_in_another_folder_begin_there(write, folder, expected):
    top = "here/" if folder.startswith("..") else ""
    write(
        **{
            f"{top}{folder}": f"variables: {{dir: .}}\n{SOURCES}",
            f"{top}a": f"extends: {folder}.yaml",
        }
    )

    models = data_of(f"{top}a.yaml")["models"]

    adapters = models["one"]["adapters"]
    found = [models["one"]["source"], adapters["a"]["source"], adapters["c"]["source"]]
    assert [str(Path(path)) for path in expected] == [str(Path(path)) for path in found]
    assert [path[0] for path in expected] == [path[0] for path in found]
    assert ["org/b", "./x"] == [adapters["b"]["source"], models["two"]["source"]]


def test_lines_point_into_the_file_that_says_so(write):
    write(
        base="a:\n  b: '${one}'\n  c: '${two}'\n",
        a="extends: base.yaml\n\na:\n  c: '${three}'\n  d: '${four}'\n",
    )

    assert (
        "base.yaml:2: a.b: no variable 'one', and $$ is a dollar sign",
        "a.yaml:4: a.c: no variable 'three', and $$ is a dollar sign",
        "a.yaml:5: a.d: no variable 'four', and $$ is a dollar sign",
    ) == refusal().problems


def test_a_recipe_that_extends_itself_is_refused(write, tmp_path):
    write(a="extends: sub/b.yaml", sub__b="\nextends: ../sub/../a.yaml")

    error = refusal()

    assert str(error) == (
        f"Recipe 'sub/../sub/../a.yaml' extends itself, through '{tmp_path}/a.yaml', "
        f"'{tmp_path}/sub/b.yaml'. Break it."
    )
    assert ["sub/b.yaml:2: extends", "a.yaml:1: extends"] == error.__notes__


def test_a_recipe_below_that_cannot_be_read_is_named_with_who_wants_it(write):
    write(a="\nextends: [b.yaml, no.yaml]", b="b: 1", c="extends: d.yaml", d="a: [")

    missing, malformed = refusal(), refusal("c.yaml")

    assert str(missing).startswith("File 'no.yaml' cannot be read: [Errno 2]")
    assert ["a.yaml:2: extends"] == missing.__notes__
    assert str(malformed).startswith("d.yaml:1: no valid YAML: ")
    assert ["c.yaml:1: extends"] == malformed.__notes__


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("5", "5"),
        ("[]", "[]"),
        ("", "None"),
        ("[a.yaml, 5]", "['a.yaml', 5]"),
        ("{a: b}", "{'a': 'b'}"),
    ],
)
def test_what_is_extended_must_be_paths(write, value, shown):
    write(a=f"\nextends: {value}\n")

    assert f"a.yaml:2: extends: expected paths of recipes, got {shown}." == str(refusal())


@pytest.mark.parametrize("text", ["", "- models", "models", "5"])
def test_a_recipe_must_be_a_mapping_also_one_that_is_extended(write, text):
    write(a=text, b="extends: a.yaml\nmodels: {}")

    expected = "a.yaml: no recipe: expected a mapping with models, got "
    assert str(refusal()).startswith(expected)
    assert str(refusal("b.yaml")).startswith(expected)


@pytest.mark.parametrize("name", ["", "\\0.yaml"])
def test_what_no_file_is_called_cannot_be_extended(write, name):
    write(a=f'extends: "{name}"')

    assert str(refusal()).startswith("File '")


def test_a_hint_is_given_where_it_is_clear():
    assert ": did you mean 'select'?" == did_you_mean("selct", ["select", "exclude"])
    assert "" == did_you_mean("x", {"select": 1})
