"""Two processes with half the batch each, by `DistributedDataParallel`; the argument is the results' folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.steps import LORA, PROMPTS, Results, base, edit, half, mean, train
from torch.nn.parallel import DistributedDataParallel

from surgery_core import Session

folder = Path(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo")
results = Results(folder)
for name, adapters in {
    "prompts": {"a": PROMPTS},
    "lora": {"a": LORA},
    "both": {"a": {"rules": [PROMPTS, LORA]}},
}.items():
    model = base()
    # Each process draws other first values; wrapping gives all those of the first.
    edited = edit(model, seed=dist.get_rank(), **adapters)
    # Without looking for unused parameters, which the frozen base might have been.
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    results.fact(**{f"losses {name}": mean(train(wrapped, half()))})
    results.tensors(f"trained {name}", edited.tensors("a"))
    if dist.get_rank() == 0:
        Session().save(edited, folder / f"record {name}")
dist.destroy_process_group()
