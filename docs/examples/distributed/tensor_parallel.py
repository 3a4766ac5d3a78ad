"""Train an adaption prompt on a model whose heads are spread over the processes that torchrun starts."""

import argparse

import torch
import torch.distributed as dist
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def main() -> None:
    """Train on every row of a tensor of token ids, in order, and save the adapter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", help="folder of the base model")
    parser.add_argument("tokens", help="file with token ids, (rows, length), that torch.save wrote")
    parser.add_argument("output", help="folder for the adapter")
    parser.add_argument("--tp-size", type=int, default=2, help="number of processes")
    parser.add_argument("--batch-size", type=int, default=4, help="rows, the same in each process")
    args = parser.parse_args()

    spread = DistributedConfig(tp_size=args.tp_size, tp_plan="auto")
    base = AutoModelForCausalLM.from_pretrained(args.base, distributed_config=spread)
    torch.manual_seed(0)
    # All processes get the prompts that the first one draws.
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
    model = AdaptionPromptModel(base, {"default": config}, "default")
    named = [found for found in model.named_parameters() if found[1].requires_grad]
    groups = [
        {"params": [p for name, p in named if name.endswith("adaption_gate")], "lr": 0.1},
        {"params": [p for name, p in named if name.endswith("adaption_prompt")], "lr": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for ids in DataLoader(torch.load(args.tokens), batch_size=args.batch_size):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"loss {loss.item():.9f}")

    # Every process calls it, since the base recorded beside the adapter is spread; the first writes.
    model.save_pretrained(args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
