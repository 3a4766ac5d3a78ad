"""Run a script with accelerate's FSDP2 on the CPU; the arguments are the script and its own."""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType
from surgery_adaption_prompt import AdaptionPromptModel

from surgery_core import is_sharded

# accelerate 1.15 shards over accelerators only, by what it calls the kind of processes; with CPUs it
# would leave FSDP out without a word. Everything else is as users have it.
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

save = AdaptionPromptModel.save_pretrained


def save_and_say(model, *args):
    """Say whether the model was sharded, which its results do not show."""
    flags = [is_sharded(parameter) for parameter in model.parameters()]
    sys.stdout.write(f"sharded: {sum(flags)} of {len(flags)}\n")
    save(model, *args)


AdaptionPromptModel.save_pretrained = save_and_say
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
