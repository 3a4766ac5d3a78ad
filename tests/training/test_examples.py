"""Examples: lines of a file, tokens with labels on answers alone, and what is too long."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.trainable import CHARACTERS, VOCAB, make_tokenizer
from surgery_training.examples import IGNORED, Dialogue, Encoder, encode_all, read_dialogues

from surgery_core import OptionsError, RecipeError

TOKENS = {i: token for token, i in VOCAB.items()}


def dialogue(*messages, is_pair=False):
    roles = {"u": "user", "a": "assistant", "y": "system"}
    said = tuple({"role": roles[role], "content": text} for role, text in messages)
    return Dialogue(messages=said, is_pair=is_pair, where="file:1")


def pair(prompt, answer):
    return dialogue(("u", prompt), ("a", answer), is_pair=True)


def written(tokens):
    """Write tokens, those with a label between brackets."""
    text = ""
    for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
        assert label in (IGNORED, token)
        text += TOKENS[token] if label == IGNORED else f"[{TOKENS[token]}]"
    return text


@pytest.fixture(scope="module")
def chat():
    return Encoder(make_tokenizer(), "chat")


@pytest.fixture(scope="module")
def plain():
    return Encoder(make_tokenizer(None), "plain")


def test_labels_are_on_the_answer_and_the_token_that_ends_it(chat):
    """What the template writes behind the end of the last turn is left out."""
    assert written(chat.encode(pair("hi", "ok"))) == "<u>hi</s> <a>[o][k][</s>]"


def test_every_answer_of_a_dialogue_has_labels(chat):
    said = dialogue(("y", "s"), ("u", "q"), ("a", "x"), ("u", "r"), ("a", "z"))

    expected = "<y>s</s> <u>q</s> <a>[x][</s>] <u>r</s> <a>[z][</s>]"
    assert expected == written(chat.encode(said))


def test_plain_text_has_prompt_answer_and_end(plain):
    assert written(plain.encode(pair("hi:", " ok"))) == "hi:[ ][o][k][</s>]"


@given(st.lists(st.text(CHARACTERS, min_size=1), min_size=2, max_size=6))
def test_prompts_are_the_same_tokens_with_and_without_answers(texts):
    """Whatever is said, and a generated answer is seen as it was in training."""
    chat = Encoder(make_tokenizer(), "chat")
    texts = [f"{text}x" for text in texts[: len(texts) // 2 * 2]]
    said = dialogue(*(("ua"[i % 2], text) for i, text in enumerate(texts)))

    tokens = chat.encode(said)
    prompt = chat.prompt(said.messages[:-1])

    assert prompt == list(tokens.input_ids[: len(prompt)])
    labelled = [token for token in tokens.labels[len(prompt) :] if token != IGNORED]
    assert labelled == [*(VOCAB[c] for c in texts[-1]), VOCAB["</s>"]]


def test_templates_that_rewrite_what_was_said_are_refused():
    last_only = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<a>{% endif %}"
    encoder = Encoder(make_tokenizer(last_only), "chat")

    with pytest.raises(
        RecipeError, match="file:1: the chat template does not say message 1 behind"
    ):
        encoder.encode(pair("hi", "ok"))


def test_templates_must_suit_the_tokenizer(chat):
    with pytest.raises(OptionsError, match="Tokenizer has no chat template"):
        Encoder(make_tokenizer(None), "chat")
    endless = make_tokenizer(None)
    endless.eos_token = None
    with pytest.raises(OptionsError, match="no token that ends a text"):
        Encoder(endless, "plain")
    assert VOCAB["<pad>"] == chat.pad
    endless.pad_token = None
    assert Encoder(make_tokenizer(), "chat").pad == 0


def test_plain_text_needs_a_pair_and_a_prompt(plain):
    with pytest.raises(
        RecipeError, match="file:1: expected prompt and answer for template 'plain'"
    ):
        plain.encode(dialogue(("u", "a"), ("a", "b")))
    with pytest.raises(RecipeError, match="file:1: expected a prompt of at least one token"):
        plain.encode(pair("", "b"))


def test_longer_examples_are_refused_by_name(chat):
    examples = [pair("hi", "ok"), pair("a long prompt", "b")]

    with pytest.raises(RecipeError) as caught:
        encode_all(chat, examples, max_length=12, too_long="refuse")

    assert caught.value.problems == (
        "file:1: expected at most 12 tokens (max_length), got 19",
        "Raise max_length, or leave them out, or say too_long: truncate.",
    )


def test_longer_examples_are_cut_off_where_that_is_said(chat):
    first, second = encode_all(
        chat, [pair("hi", "ok"), pair("hi", "okokokok")], max_length=8, too_long="truncate"
    )

    assert written(first) == "<u>hi</s> <a>[o][k]"
    assert written(second) == "<u>hi</s> <a>[o][k]"
    with pytest.raises(RecipeError, match=r"the first 5 tokens \(max_length\) have nothing of the"):
        encode_all(chat, [pair("hi", "ok")], max_length=5, too_long="truncate")


def test_lines_are_read(tmp_path):
    rows = [{"prompt": "a", "answer": "b"}, {"messages": [{"role": "assistant", "content": "c"}]}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n  \n")

    first, second = read_dialogues(str(path))

    assert (first.answer, first.is_pair, first.where) == ("b", True, f"{path}:1")
    assert (second.answer, second.is_pair, second.where) == ("c", False, f"{path}:2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no valid JSON: Expecting property name"),
        ("[" * 100_000, "no valid JSON: nested too deep"),
        ("3", "expected prompt and answer, or messages, got 3"),
        ('{"prompt": "a"}', "expected prompt and answer, or messages, got ['prompt']"),
        ('{"messages": []}', "expected prompt and answer, or messages, got ['messages']"),
        ('{"messages": ["a"]}', "expected messages with role and content, got 'a'"),
        ('{"prompt": 3, "answer": "b"}', "expected text of one of 'system'"),
        ('{"prompt": "a", "answer": " "}', "expected an answer that is not empty"),
        (
            '{"messages": [{"role": "user", "content": "c"}]}',
            "expected the last message to be the assistant's, got 'user''s",
        ),
    ],
)
def test_lines_that_are_no_examples_are_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')

    with pytest.raises(RecipeError) as caught:
        read_dialogues(str(path))

    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:2: {message}")


def test_many_problems_are_cut_and_files_without_examples_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("3\n" * 25)
    with pytest.raises(RecipeError) as caught:
        read_dialogues(str(path))
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == f"{path}: and 5 more"

    path.write_text("\n")
    with pytest.raises(RecipeError, match="are empty"):
        read_dialogues(str(path))
    with pytest.raises(RecipeError, match="cannot be read"):
        read_dialogues(str(tmp_path / "none.jsonl"))
