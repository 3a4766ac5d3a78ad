"""Whatever is wrong with a file is a RecipeError that says where, all problems of a kind at once."""

import os
from pathlib import Path

import pytest

from surgery_core import RecipeError
from surgery_core.documents import MAX_DEPTH, is_document, read_document


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function that writes a file and reads it as a document."""
    monkeypatch.chdir(tmp_path)

    def read_text(name, text):
        path = Path(name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_document(path)

    return read_text


@pytest.fixture
def refused(read):
    """Return a function that returns the message about a file that cannot be read."""

    def message_of(name, text):
        with pytest.raises(RecipeError) as caught:
            read(name, text)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return str(caught.value)

    return message_of


def test_only_mappings_are_merged(refused):
    assert (
        "a.yaml:2: '<<' merges mappings: expected one, got [1]. Fix it.\n"
        "a.yaml:3: '<<' merges mappings: expected one, got 5. Fix it."
    ) == refused("a.yaml", "a: &a [1]\nb: {<<: [*a]}\nc: {<<: 5}\n")


MALFORMED = {
    "yaml syntax": (
        "a.yaml",
        "a: 1\nb: [1, 2\nc: 3\n",
        "a.yaml:3: no valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'. "
        "Fix the line.",
    ),
    "yaml tab": (
        "a.yaml",
        "a:\n\tb: 1",
        "a.yaml:2: no valid YAML: while scanning for the next token, found character '\\t' that "
        "cannot start any token. Fix the line.",
    ),
    "yaml character": (
        "a.yaml",
        "a: 1\nb: \x00",
        "a.yaml:2: no valid YAML: character '\\x00'. Write it as an escape.",
    ),
    "yaml escape": (
        "a.yaml",
        'a: ["\\UFFFFFFFF"]',
        "a.yaml: no valid YAML: an escape stands for no character. Fix the file.",
    ),
    "another yaml escape": (
        "a.yaml",
        'a: "\\U00110000"',
        "a.yaml: no valid YAML: an escape stands for no character. Fix the file.",
    ),
    "yaml alias": (
        "a.yaml",
        "a: *b",
        "a.yaml:1: no valid YAML: found undefined alias 'b'. Fix the line.",
    ),
    "two yaml documents": (
        "a.yaml",
        "a: 1\n---\nb: 1",
        "a.yaml:2: no valid YAML: expected a single document in the stream, but found another "
        "document. Fix the line.",
    ),
    "yaml objects": (
        "a.yaml",
        "\na: !!python/object/apply:os.system [ls]",
        "a.yaml:2: no valid YAML: tag 'tag:yaml.org,2002:python/object/apply:os.system' has no "
        "meaning here. Remove it.",
    ),
    "yaml names": (
        "a.yaml",
        "\na: !!python/name:os.system",
        "a.yaml:2: no valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/name:os.system'. Fix the line.",
    ),
    "yaml sets and values of other types": (
        "a.yaml",
        "a: !!set {b}\nc: !!bool x\nd: !!int ''\ne: !!float x",
        "a.yaml:1: no valid YAML: tag 'tag:yaml.org,2002:set' has no meaning here. Remove it.\n"
        "a.yaml:2: no valid YAML: 'x' is no value of its type 'bool'. Put it in quotes.\n"
        "a.yaml:3: no valid YAML: '' is no value of its type 'int'. Put it in quotes.\n"
        "a.yaml:4: no valid YAML: 'x' is no value of its type 'float'. Put it in quotes.",
    ),
    "yaml dates and bytes": (
        "a.yaml",
        "a: !!timestamp 2024-01-01\nb: [!!binary aGk=, .nan]",
        "a.yaml:1: a: expected text, a number, true, false or null, got datetime.date(2024, 1, 1). "
        "Put it in quotes.\n"
        "a.yaml:2: b[0]: expected text, a number, true, false or null, got b'hi'. "
        "Put it in quotes.\n"
        "a.yaml:2: b[1]: expected text, a number, true, false or null, got nan. "
        "Put it in quotes.",
    ),
    "yaml keys": (
        "a.yaml",
        "a:\n  no: 1\n  5: 2\n? [x]\n: 3\n? {y: z}\n: 4",
        "a.yaml:2: key 'no' is no text: expected text, got False. Put it in quotes.\n"
        "a.yaml:3: key '5' is no text: expected text, got 5. Put it in quotes.\n"
        "a.yaml:4: key is a list or a mapping: expected text. Write text.\n"
        "a.yaml:6: key is a list or a mapping: expected text. Write text.\n"
        "a.yaml:6: key '' is there twice: expected it once. Remove one.",
    ),
    "yaml keys that are there twice": (
        "a.yaml",
        "a: 1\nb: {c: 1,\n  'c': 2}\na: 3\na: 4",
        "a.yaml:3: key 'c' is there twice: expected it once. Remove one.\n"
        "a.yaml:4: key 'a' is there twice: expected it once. Remove one.\n"
        "a.yaml:5: key 'a' is there twice: expected it once. Remove one.",
    ),
    "toml syntax": (
        "a.toml",
        "a = 1\nb = \n",
        "a.toml:2: no valid TOML: Invalid value (at line 2, column 5). Fix the line.",
    ),
    "toml end": (
        "a.toml",
        "a = [1",
        "a.toml: no valid TOML: Unclosed array (at end of document). Fix the file.",
    ),
    "toml keys that are there twice": (
        "a.toml",
        "a = 1\n\na = 2\nb = 3",
        "a.toml:3: no valid TOML: Cannot overwrite a value (at line 3, column 6). Fix the line.",
    ),
    "toml dates": (
        "a.toml",
        "[a]\nb = [1979-05-27,\n 07:32:00]",
        "a.toml:2: a.b[0]: expected text, a number, true, false or null, got "
        "datetime.date(1979, 5, 27). Put it in quotes.\n"
        "a.toml:2: a.b[1]: expected text, a number, true, false or null, got "
        "datetime.time(7, 32). Put it in quotes.",
    ),
    "json syntax": (
        "a.json",
        '{"a": 1,\n"b" 2}',
        "a.json:2: no valid JSON: Expecting ':' delimiter. Fix the line.",
    ),
    "json keys that are there twice": (
        "a.json",
        '{"a": 1,\n"b": {"c": 1,\n"c": 2},\n"a": 2}',
        "a.json:3: key 'c' is there twice: expected it once. Remove one.\n"
        "a.json:4: key 'a' is there twice: expected it once. Remove one.",
    ),
    "the same where yaml cannot tell lines": (
        "a.json",
        '{"a": "\x7f",\n"b": 1, "b": 2}',
        "a.json: key 'b' is there twice: expected it once. Remove one.",
    ),
    "json numbers": (
        "a.json",
        '{"a":\nNaN}',
        "a.json:1: a: expected text, a number, true, false or null, got nan. Put it in quotes.",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_with_the_line(refused, case):
    name, text, expected = MALFORMED[case]

    assert expected == refused(name, text)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [("a.yaml", "a: ~", ":1"), ("a.json", '{"a": ~}', ""), ("a.toml", "a = ~", "")],
)
def test_numbers_of_more_digits_than_python_reads_are_refused(refused, name, text, line):
    assert refused(name, text.replace("~", "9" * 5000)).startswith(f"{name}{line}: no valid ")


TOO_DEEP = f"values are nested deeper than {MAX_DEPTH}: expected at most that. Flatten them."


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 600])
@pytest.mark.parametrize(("name", "text"), [("a.yaml", "~"), ("a.json", "~"), ("a.toml", "a = ~")])
def test_deep_nesting_is_refused(refused, name, text, depth):
    nested = "[" * depth + "]" * depth

    assert f"{name}: {TOO_DEEP}" == refused(name, text.replace("~", nested))


@pytest.mark.parametrize("text", ["&a [*a]", "&a {b: *a}", "&a {<<: *a}"])
def test_what_contains_itself_is_refused(refused, text):
    assert f"a.yaml: {TOO_DEEP}" == refused("a.yaml", text)


BOMB = "a0: &a0 {x: 1, y: 1}\n"


@pytest.mark.parametrize("value", ["[~]", "{<<: [~]}"])
def test_aliases_of_aliases_are_bounded(refused, value):
    """Ten million values in twelve lines would take minutes and gigabytes."""
    levels = [
        f"a{i}: &a{i} {value.replace('~', ', '.join([f'*a{i - 1}'] * 10))}\n" for i in range(1, 8)
    ]

    expected = "a.yaml: more than 100,000 values: expected at most that. Split it."
    assert expected == refused("a.yaml", BOMB + "".join(levels))


def test_a_problem_behind_many_aliases_is_told_once(refused):
    text = "a: &a {no: 1}\nb: [" + "*a, " * 50 + "*a]"

    expected = "a.yaml:1: key 'no' is no text: expected text, got False. Put it in quotes."
    assert expected == refused("a.yaml", text)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "no.yaml"

    with pytest.raises(RecipeError) as caught:
        read_document(path)

    assert str(caught.value) == (
        f"File {str(path)!r} cannot be read: [Errno 2] No such file or directory: {str(path)!r}. "
        "Pass a file of text."
    )


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "a.toml").mkdir()

    with pytest.raises(RecipeError, match=r"a.toml' cannot be read: \[Errno 21\] Is a directory"):
        read_document(tmp_path / "a.toml")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.touch(mode=0)

    with pytest.raises(RecipeError, match="Permission denied"):
        read_document(path)


@pytest.mark.parametrize("name", ["a.yaml", "a.json", "a.toml"])
def test_a_binary_file_is_refused(refused, name):
    assert refused(name, b"\x80\x81") == (
        f"File {name!r} cannot be read: 'utf-8' codec can't decode byte 0x80 in position 0: "
        "invalid start byte. Pass a file of text."
    )


def test_a_path_that_no_system_has_is_refused():
    with pytest.raises(RecipeError, match="cannot be read: embedded null byte"):
        read_document(Path("a\x00.yaml"))


@pytest.mark.parametrize("name", ["a.txt", "yaml", "a.yaml.bak"])
def test_another_suffix_is_refused_before_the_file_is_read(name):
    with pytest.raises(RecipeError) as caught:
        read_document(Path(name))

    assert str(caught.value) == (
        f"File {name!r} has an unknown format: expected a suffix of '.yaml', '.yml', '.toml', "
        "'.json'. Rename it."
    )
    assert not is_document(Path(name))
