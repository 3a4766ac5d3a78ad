"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199) as a plugin of `surgery_core`."""

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.checkpoints import adapter_state, load_state_
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.functional import activate_gate, gated_prompt_attention
from surgery_adaption_prompt.model import AdaptionPromptModel
from surgery_adaption_prompt.operation import AdaptionPromptOperation

__version__ = "0.1.0.dev0"

__all__ = [
    "AdaptedAttention",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "AdaptionPromptOperation",
    "activate_gate",
    "adapter_state",
    "gated_prompt_attention",
    "load_state_",
]
