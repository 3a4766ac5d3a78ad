"""Two processes, parameters partitioned by DeepSpeed ZeRO-3; the argument is the results' folder."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.steps import (
    Results,
    base,
    edit,
    half,
    mean,
    optimizer,
    refusal,
    several,
)

from surgery_core import Session, diagnose

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed  # reads the line above

folder = Path(sys.argv[1])
torch.set_num_threads(1)
deepspeed.init_distributed(dist_backend="gloo")
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    # So that no tensor is too small to be partitioned.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
results = Results(folder)


def start(model):
    return deepspeed.initialize(model=model, optimizer=optimizer(model), config=CONFIG)[0]


model = base(torch.float32)
edited = edit(model)
first = {key: tensor.detach().clone() for key, tensor in edited.tensors("a").items()}
engine = start(model)
losses = []
for _ in range(3):
    loss = engine(input_ids=half(), labels=half(), use_cache=False).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
results.fact(
    losses=mean(losses),
    found=[[found.level, found.subject] for found in diagnose(model)],
    planned=refusal(lambda: edit(model)),
    saved=refusal(lambda: Session().save(edited, folder / "record")),
    exported=refusal(lambda: Session().export(edited, "a", folder / "empty")),
    loaded=refusal(lambda: edited.load_("a", first)),
)
with deepspeed.zero.GatheredParameters(edited.added_parameters()):
    results.tensors("trained", edited.tensors("a"))
    Session().save(edited, folder / "record")
    Session().export(edited, "a", folder / "adapter")

model = base(torch.float32)
edited = several(model)
start(model)
results.fact(switched=refusal(lambda: edited.set_active("c")), active=edited.active)

with deepspeed.zero.Init(config_dict_or_path=CONFIG):
    empty = torch.nn.Sequential(torch.nn.Linear(2, 2))
results.fact(initialised=[[found.level, found.subject] for found in diagnose(empty)])
dist.destroy_process_group()
