"""Teach a frozen language model to name the digit in an image that its prompts are given."""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

QUESTION = (1, 2, 3)
FIRST_DIGIT = 10
NUM_TRAINED = 800
"""The images after these are held out."""


def frozen_base():
    """Return a small Llama with random weights, the same in every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    config = LlamaConfig(vocab_size=32, num_attention_heads=4, initializer_range=0.1, **sizes)
    return LlamaForCausalLM(config).eval()


def digit_logits(model, features):
    """Return the logits of the ten digits' tokens after the question, `(rows, 10)`."""
    question = torch.tensor([QUESTION]).expand(len(features), -1)
    logits = model(question, condition=features, use_cache=False).logits
    return logits[:, -1, FIRST_DIGIT : FIRST_DIGIT + 10]


def accuracy(logits, labels):
    """Return the share of images whose digit is named."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def main():
    """Train, save, load into a fresh base, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-dir", type=Path, default=Path("digit-namer"))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    # Tensors here are tiny: threads cost more than they bring.
    torch.set_num_threads(1)

    data = load_file(Path(__file__).with_name("digits.safetensors"))
    # Pixels are 0 to 16.
    images, labels = data["images"].float() / 16, data["labels"].long()
    config = AdaptionPromptConfig(
        adapter_len=4, adapter_layers=4, gate="head", condition_size=64, condition_rank=16
    )
    model = AdaptionPromptModel(frozen_base(), {"default": config}, "default")
    optimizer = torch.optim.AdamW(model.adapter_parameters(["default"]), lr=1e-2)
    for _ in range(options.steps):
        rows = torch.randint(NUM_TRAINED, (64,))
        loss = cross_entropy(digit_logits(model, images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.save_pretrained(options.out_dir)
    fresh = AdaptionPromptModel.from_pretrained(frozen_base(), options.out_dir)
    held_out, names = images[NUM_TRAINED:], labels[NUM_TRAINED:]
    with torch.no_grad():
        logits = digit_logits(model, held_out)
        blind = digit_logits(model, torch.zeros_like(held_out))
        loaded = digit_logits(fresh, held_out)
    print(f"held-out accuracy: {accuracy(logits, names):.3f}")
    print(f"with zeros for images: {accuracy(blind, names):.3f}")
    print(f"loaded, same logits: {torch.equal(logits, loaded)}")


if __name__ == "__main__":
    main()
