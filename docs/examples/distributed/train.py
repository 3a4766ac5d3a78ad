"""Train an adaption prompt; `accelerate launch` says over how many processes, and how: DDP or FSDP2."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main() -> None:
    """Train on every row of a tensor of token ids, in order, and save the adapter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", help="folder of the base model")
    parser.add_argument("tokens", help="file with token ids, (rows, length), that torch.save wrote")
    parser.add_argument("output", help="folder for the adapter")
    parser.add_argument("--batch-size", type=int, default=2, help="rows for each process")
    args = parser.parse_args()

    accelerator = Accelerator()
    # The same first prompts in every process.
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.base)
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
    model = AdaptionPromptModel(base, {"default": config}, "default")
    named = [found for found in model.named_parameters() if found[1].requires_grad]
    groups = [
        {"params": [p for name, p in named if name.endswith("adaption_gate")], "lr": 0.1},
        {"params": [p for name, p in named if name.endswith("adaption_prompt")], "lr": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rows = DataLoader(torch.load(args.tokens), batch_size=args.batch_size)
    # After the adapter is there: what wraps or shards the model takes its parameters as they are now.
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)

    for ids in rows:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        # The mean over all processes.
        accelerator.print(f"loss {accelerator.reduce(loss.detach(), 'mean').item():.9f}")

    # Sharded tensors are gathered, to which every process contributes; otherwise the first has all.
    if accelerator.is_fsdp2 or accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output)
    # A process that went on at once could take its gloo group down while that still frees tensors, and
    # wait for ever.
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
