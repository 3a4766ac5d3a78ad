"""Answers and scores: greedy, in order whatever the batches, by the formula."""

import json

import pytest
import torch
from support.trainable import make_model, make_tokenizer, pairs
from surgery_training.examples import Encoder, _dialogue
from surgery_training.inference import answers, score
from torch import nn

from surgery_core import OptionsError


def dialogues(rows):
    return [_dialogue(json.dumps(row), f"file:{i}") for i, row in enumerate(rows, 1)]


def greedy(model, prompt, count):
    """Return the tokens that one after the other are the most probable, up to the end of a turn."""
    tokens = list(prompt)
    for _ in range(count):
        following = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(following)
        if following == model.generation_config.eos_token_id:
            break
    return tokens[len(prompt) :]


@pytest.mark.slow
@torch.no_grad()
def test_answers_are_the_most_probable_tokens_in_the_order_of_the_prompts():
    model, encoder = make_model(seed=5), Encoder(make_tokenizer(), "chat")
    prompts = [encoder.prompt(d.messages[:-1]) for d in dialogues(pairs(5))]

    found = answers(model, encoder, prompts, max_new_tokens=6, batch_size=2)

    expected = [
        encoder.tokenizer.decode(greedy(model, prompt, 6), skip_special_tokens=True)
        for prompt in prompts
    ]
    assert len({len(prompt) for prompt in prompts}) > 1
    assert found == expected
    assert len(set(found)) > 1


@torch.no_grad()
def test_the_loss_is_the_mean_over_all_labels_and_exact_matches_are_counted():
    model, encoder = make_model(seed=5), Encoder(make_tokenizer(), "chat")
    rows = pairs(3)
    prompt = encoder.prompt([{"role": "user", "content": rows[1]["prompt"]}])
    said = encoder.tokenizer.decode(greedy(model, prompt, 40), skip_special_tokens=True)
    rows[1]["answer"] = f" {said.strip()} "
    asked = dialogues(rows)
    examples = [encoder.encode(dialogue) for dialogue in asked]

    found = score(model, encoder, asked, examples, batch_size=2)

    losses = []
    for example in examples:
        logits = model(torch.tensor([example.input_ids])).logits[0, :-1].double().log_softmax(-1)
        for row, label in zip(logits, example.labels[1:], strict=True):
            if label != -100:
                losses.append(-row[label])
    assert found.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert found.total == 3
    assert len(found.replies) == 3
    assert found.exact == sum(
        reply.strip() == row["answer"].strip()
        for reply, row in zip(found.replies, rows, strict=True)
    )


def test_models_that_cannot_generate_are_refused():
    with pytest.raises(OptionsError, match="Model Linear cannot generate"):
        answers(nn.Linear(1, 1), Encoder(make_tokenizer(), "chat"), [[1]], max_new_tokens=1)
