"""A tiny Llama in a folder, with a tokenizer of single characters, and files to train it from."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<u>", "<a>", "<y>")
SPECIAL_NAMES = {"pad": "pad", "bos": "s", "eos": "/s"}
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .:?"
VOCAB = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'user': '<u>', 'assistant': '<a>', 'system': '<y>'}[m['role']] + m['content'] + '</s>' }} "
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
"""Behind the end of each turn it has a space, as many templates have a line's end."""

ADAPTERS = {
    "prompts": {
        "operation": "adaption_prompt",
        "options": {"adapter_len": 3, "adapter_layers": 2, "gate": "head"},
    },
    "low_rank": {"operation": "low_rank", "select": "**.q_proj", "options": {"lora_dropout": 0.2}},
    "scales": {"operation": "scale_shift", "select": "**.mlp.up_proj"},
}


def make_tokenizer(template=TEMPLATE):
    """Return a tokenizer that has a token for each character."""
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="."))  # noqa: S106 (no password)
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    special = {f"{name}_token": f"<{text}>" for name, text in SPECIAL_NAMES.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **special,
        additional_special_tokens=["<u>", "<a>", "<y>"],
        chat_template=template,
    )


def make_model(dtype=torch.float32, seed=0):
    """Return a tiny Llama with dropout on its attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attention_dropout=0.1,
        # Otherwise no adapter could make any token probable.
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def write_lines(path, rows):
    """Write rows as JSON, one a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def pairs(count, start=0):
    """Return prompts of different lengths, with the answer that each has."""
    return [
        {"prompt": f"say {i}" + " please" * (i % 3), "answer": f"{i} {i % 7}"}
        for i in range(start, start + count)
    ]


def write_task(folder, adapter="prompts", dtype=torch.float32, **settings):
    """Write a model, a recipe, data and a training file; return recipe and training file."""
    folder = Path(folder)
    if not (folder / "llama").exists():
        make_model(dtype).save_pretrained(folder / "llama")
        make_tokenizer().save_pretrained(folder / "llama")
    recipe = {"models": {"chat": {"source": "./llama", "adapters": {"own": ADAPTERS[adapter]}}}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    write_lines(folder / "train.jsonl", pairs(13))
    write_lines(folder / "held.jsonl", pairs(5, start=40))
    data = {"train": "train.jsonl", "validation": "held.jsonl"}
    values = {"data": data, "batch_size": 3, "max_steps": 7, "warmup": 1, **settings}
    (folder / "training.json").write_text(json.dumps(values))
    return folder / "recipe.json", folder / "training.json"
