"""Training files: paths, defaults, and what is refused with its line."""

import pytest
from surgery_training import load_training_settings

from surgery_core import RecipeError


def refused(tmp_path, text):
    path = tmp_path / "training.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_training_settings(path)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_paths_are_relative_to_the_file(tmp_path):
    text = "data: {train: a/train.jsonl, validation: /b/held.jsonl}\ntokenizer: ./llama\n"
    (tmp_path / "training.yaml").write_text(text)

    settings = load_training_settings(tmp_path / "training.yaml")

    assert settings.data.train == str(tmp_path / "a/train.jsonl")
    assert settings.data.validation == "/b/held.jsonl"
    assert settings.tokenizer == str(tmp_path / "llama")
    assert (settings.learning_rate, settings.gate_learning_rate) == (0.02, None)


def test_identifiers_of_tokenizers_are_no_paths(tmp_path):
    (tmp_path / "training.yaml").write_text("data: {train: a}\ntokenizer: some/llama\n")

    assert load_training_settings(tmp_path / "training.yaml").tokenizer == "some/llama"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 3", "training.yaml:1: expected 'data', got no such key"),
        (
            "data: {train: a}\nlearning_rat: 3\n",
            "training.yaml:2: unknown key 'learning_rat': did you mean 'learning_rate'?",
        ),
        (
            "data: {train: a}\ncollator: pad\n",
            "training.yaml:2: collator: expected 'padding' or 'packing', got 'pad'",
        ),
        (
            "data: {train: a}\nbatch_size: 0\n",
            "training.yaml:2: batch_size: expected at least 1, got 0",
        ),
        (
            "data: {train: a}\nepochs: 1\nmax_steps: 2\n",
            "training.yaml:1: expected either epochs or max_steps, got both",
        ),
        (
            "data: {train: a}\nearly_stopping: 2\n",
            "training.yaml:1: expected data.validation, by which early_stopping decides",
        ),
        ("data: {train: 3}\n", "training.yaml:1: data.train: expected text, got 3"),
    ],
)
def test_problems_are_named_with_their_line(tmp_path, text, message):
    assert refused(tmp_path, text) == message
