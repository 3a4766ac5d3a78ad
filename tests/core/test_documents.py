"""Files become plain data with lines; whatever is wrong with one is a RecipeError that says where."""

import datetime as dt
import re
from pathlib import Path

import pytest

from surgery_core.documents import (
    MAX_DEPTH,
    Document,
    describe_place,
    is_document,
    merged,
    read_document,
    read_scalar,
    write_yaml,
)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function that writes a file and reads it as a document."""
    monkeypatch.chdir(tmp_path)

    def read_text(name, text):
        path = Path(name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_document(path)

    return read_text


def lines_of(document):
    """Return the lines of a document by place, as people write both."""
    return {describe_place(place): line for place, (_, line) in document.lines.items()}


YAML = """\
# A comment
version: 1
models:
  "the one":
    rules:
      - operation: gate
        options: {a: 1,
                  b: [2, 3]}
      -
        operation: shift
"""


def test_yaml_knows_the_line_of_every_key_and_item(read):
    found = read("a.yaml", YAML)

    rule = {"operation": "gate", "options": {"a": 1, "b": [2, 3]}}
    assert {
        "version": 1,
        "models": {"the one": {"rules": [rule, {"operation": "shift"}]}},
    } == found.data
    assert {
        "the recipe": 1,
        "version": 2,
        "models": 3,
        "models.'the one'": 4,
        "models.'the one'.rules": 5,
        "models.'the one'.rules[0]": 6,
        "models.'the one'.rules[0].operation": 6,
        "models.'the one'.rules[0].options": 7,
        "models.'the one'.rules[0].options.a": 7,
        "models.'the one'.rules[0].options.b": 8,
        "models.'the one'.rules[0].options.b[0]": 8,
        "models.'the one'.rules[0].options.b[1]": 8,
        "models.'the one'.rules[1]": 10,
        "models.'the one'.rules[1].operation": 10,
    } == lines_of(found)


TOML = '''\
# [no.header]
version = 1
models.other.freeze = true  # [nor.this]
text = """
[inside]
key = "x\\""
"""
literal = \'\'\'
[inside]\'\'\'
nested = [
  [ "a" ],
  ["b", "}"]
]
[models.chat]
source = "x # ["
[[models.chat.rules]]
operation = 'gate'
  options . a . "b.c" = 1
[[models.chat.rules]]
  "operation" = "shift"
[models.chat.rules.options]
k = {x = 1, y = [{z = 2}]}
[[models.chat.rules.more]]
a = 1
[[models.chat.rules.more]]
[models.chat.rules.more.'d"e']
b = 1
'''


def test_toml_knows_the_line_of_every_key_that_begins_a_line(read):
    found = read("a.toml", TOML)

    assert found.data["models"]["chat"]["rules"][1]["more"][1] == {'d"e': {"b": 1}}
    assert {
        "the recipe": 1,
        "version": 2,
        "models": 3,
        "models.other": 3,
        "models.other.freeze": 3,
        "text": 4,
        "literal": 8,
        "nested": 10,
        "models.chat": 14,
        "models.chat.source": 15,
        "models.chat.rules": 16,
        "models.chat.rules[0]": 16,
        "models.chat.rules[0].operation": 17,
        "models.chat.rules[0].options": 18,
        "models.chat.rules[0].options.a": 18,
        "models.chat.rules[0].options.a.'b.c'": 18,
        "models.chat.rules[1]": 19,
        "models.chat.rules[1].operation": 20,
        "models.chat.rules[1].options": 21,
        "models.chat.rules[1].options.k": 22,
        "models.chat.rules[1].more": 23,
        "models.chat.rules[1].more[0]": 23,
        "models.chat.rules[1].more[0].a": 24,
        "models.chat.rules[1].more[1]": 25,
        "models.chat.rules[1].more[1].'d\"e'": 26,
        "models.chat.rules[1].more[1].'d\"e'.b": 27,
    } == lines_of(found)


def test_toml_counts_lines_as_editors_do(read):
    """A character that Unicode calls the end of a line is none, and Windows' ends are."""
    found = read("a.toml", 'a = "\u2028"\r\n# \u2028\r\nb = 1\r\n')

    assert {"the recipe": 1, "a": 1, "b": 3} == lines_of(found)


def test_values_inside_a_line_of_toml_are_where_the_line_begins(read):
    found = read("a.toml", "\nk = {y = [{z = 2}]}")

    assert "a.toml:2" == found.where(("k", "y", 0, "z"))


@pytest.mark.parametrize("indent", ["  ", "\t", ""])
def test_json_knows_the_line_of_every_key_and_item(read, indent):
    text = '{\n"version":1,\n~"models": {\n~"a\\/b": [\n~{},\n~true]}}\n'

    found = read("a.json", text.replace("~", indent))

    assert {"version": 1, "models": {"a/b": [{}, True]}} == found.data
    expected = {
        "the recipe": 1,
        "version": 2,
        "models": 3,
        "models.a/b": 4,
        "models.a/b[0]": 5,
        "models.a/b[1]": 6,
    }
    assert expected == lines_of(found)


def test_json_that_is_no_yaml_is_read_without_lines(read):
    found = read("a.json", '{"\x7f": 1}')

    assert {"\x7f": 1} == found.data
    assert "a.json" == found.where(("\x7f",))


def test_a_place_without_a_line_has_that_of_what_is_around_it():
    document = Document(path=Path("a"), data={}, lines={("x",): (Path("b"), 7)})

    assert ["b:7", "b:7", "a"] == [document.where(p) for p in (("x",), ("x", 0, "y"), ("y",))]


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "A.YAML", "a.json", "a.toml", "a.TOML"])
def test_the_suffix_says_the_format_in_either_case(read, name):
    text = {"j": '{"a": [1]}', "t": "a = [1]"}.get(name[2].lower(), "a: [1]")

    assert {"a": [1]} == read(name, text).data
    assert is_document(Path(name))


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "a: 1"), ("a.json", "{}"), ("a.toml", "")])
def test_a_byte_order_mark_is_no_part_of_the_text(read, name, text):
    expected = read(name, text)

    assert expected == read(name, b"\xef\xbb\xbf" + text.encode())


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "~"])
def test_an_empty_yaml_file_is_nothing(read, text):
    assert read("a.yaml", text).data is None


def test_numbers_of_yaml_are_those_of_the_other_formats(read):
    numbers = "[1e-3, 1E3, -2.5e+1, .5e1, 1.5, 7]"

    assert [0.001, 1000.0, -25.0, 5.0, 1.5, 7] == read("a.yaml", f"a: {numbers}").data["a"]


def test_dates_of_yaml_are_text(read):
    assert ["2024-01-01", "2024-13-45"] == read("a.yaml", "[2024-01-01, 2024-13-45]").data


MERGING = """\
base: &base {a: 1, b: {c: 2}}
more: &more
  a: 5
  d: 6
one:
  <<: *base
  b: 3
both:
  b: 4
  <<: [*more, *base]
"""


def test_mappings_of_yaml_are_merged_behind_what_a_mapping_says_itself(read):
    found = read("a.yaml", MERGING)

    assert {"a": 1, "b": 3} == found.data["one"]
    assert {"a": 5, "b": 4, "d": 6} == found.data["both"]
    assert ["a.yaml:1", "a.yaml:7"] == [found.where(("one", key)) for key in "ab"]
    assert ["a.yaml:3", "a.yaml:9", "a.yaml:4"] == [found.where(("both", key)) for key in "abd"]
    assert "a.yaml:8" == found.where(("both",))


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "~"), ("a.json", "~")])
def test_nesting_that_is_as_deep_as_allowed_is_read(read, name, text):
    depth = MAX_DEPTH
    nested = "[" * depth + "7" + "]" * depth

    found = read(name, text.replace("~", nested)).data

    for _ in range(depth):
        (found,) = found
    assert 7 == found


def document(path, data, lines):
    places = {tuple(place.split(".")) if place else (): line for place, line in lines.items()}
    return Document(
        path=Path(path), data=data, lines={p: (Path(path), line) for p, line in places.items()}
    )


def test_mappings_are_merged_and_all_else_is_replaced():
    low = document(
        "low",
        {"a": {"b": 1, "c": {"d": 2}, "e": [1, 2]}, "k": 0},
        {"": 1, "a": 2, "a.b": 3, "a.c": 4, "a.c.d": 5, "a.e": 6, "k": 7},
    )
    high = document(
        "high",
        {"a": {"c": 5, "e": [3], "f": {"g": 6}}},
        {"": 1, "a": 11, "a.c": 12, "a.e": 13, "a.f": 14, "a.f.g": 15},
    )

    found = merged(low, high)

    assert {"a": {"b": 1, "c": 5, "e": [3], "f": {"g": 6}}, "k": 0} == found.data
    assert ["a", "k"] == list(found.data)
    assert Path("high") == found.path
    expected = {
        "": "high:1",
        "a": "high:11",
        "a.b": "low:3",
        "a.c": "high:12",
        # What was there is gone, and so is its line.
        "a.c.d": "high:12",
        "a.e": "high:13",
        "a.f.g": "high:15",
        "k": "low:7",
    }
    assert expected == {
        place: found.where(tuple(place.split(".")) if place else ()) for place in expected
    }


def test_merging_changes_neither_document():
    low, high = document("low", {"a": {"b": 1}}, {"a": 1}), document("high", {"a": {"b": 2}}, {})

    merged(low, high)

    assert {"a": {"b": 1}} == low.data
    assert {("a",): (Path("low"), 1)} == low.lines
    assert {"a": {"b": 2}} == high.data


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((), "the recipe"),
        (("models", "chat", "rules", 0, "select"), "models.chat.rules[0].select"),
        (("a b", "", "c.d", "e[0]", "it's"), "'a b'.''.'c.d'.'e[0]'.\"it's\""),
        (("x\n", "\x1b[31m", "é", "a/b", "-1"), "'x\\n'.'\\x1b[31m'.é.a/b.-1"),
    ],
)
def test_places_read_unambiguously(place, expected):
    assert expected == describe_place(place)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", 8),
        ("-1.5", -1.5),
        ("1e-3", 0.001),
        (".inf", float("inf")),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", ""),
        ("text", "text"),
        ("*.up", "*.up"),
        ("layers.{-2..}.up", "layers.{-2..}.up"),
        ("[1, 2]", "[1, 2]"),
        ("a: b", "a: b"),
        ("a #b", "a #b"),
        (" 5", " 5"),
        ("2024-01-01", "2024-01-01"),
        ("<<", "<<"),
        ("=", "="),
        ("@x", "@x"),
        ("%x", "%x"),
        ("'8'", "8"),
        ('"a\\tb"', "a\tb"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_text_of_a_command_line_is_read_as_a_scalar(text, expected):
    found = read_scalar(text)

    assert (type(expected), expected) == (type(found), found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'a", "while scanning a quoted scalar, found unexpected end of stream"),
        ("'a' b", "expected '<document start>', but found '<scalar>'"),
        ('"a": 1', "expected nothing behind the quotes"),
        ("'\x00'", "no such character"),
        ('"\\UFFFFFFFF"', "no such character"),
    ],
)
def test_quotes_must_end_where_the_text_does(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_scalar(text)


def test_what_is_written_as_yaml_reads_as_the_same(read):
    data = {
        "texts": [
            "1e-3",
            "5",
            "no",
            "2024-01-01",
            "<<",
            "=",
            "",
            "a: b",
            "\ud800",
            "\x00",
            "é\n",
            "\x85",
            "a\u2028b",
        ],
        "numbers": [1e-05, 1e300, -0.0, float("inf"), 7, True],
        "no": {"1": None, "<<": {}, "": []},
    }

    assert data == read("a.yaml", write_yaml(data)).data
    assert list(data) == list(read("a.yaml", write_yaml(data)).data)


def test_values_of_python_that_files_cannot_hold_are_not_written():
    with pytest.raises(Exception, match="represent"):
        write_yaml({"a": dt.timedelta(1)})
