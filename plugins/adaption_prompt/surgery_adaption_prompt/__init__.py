"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199) as a plugin of `surgery_core`."""

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.base_check import base_fingerprint, check_base
from surgery_adaption_prompt.checkpoints import adapter_state, load_state_
from surgery_adaption_prompt.composition import Composition
from surgery_adaption_prompt.condition import conditioned
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.fixed_rows import FixedRows
from surgery_adaption_prompt.functional import activate_gate, gated_prompt_attention
from surgery_adaption_prompt.gate_plot import draw_gates
from surgery_adaption_prompt.importers import read_litgpt, read_llama_adapter
from surgery_adaption_prompt.model import AdaptionPromptModel, get_peft_model
from surgery_adaption_prompt.operation import AdaptionPromptOperation
from surgery_adaption_prompt.status import AdapterStatus, ModelStatus, adapter_status, model_status
from surgery_adaption_prompt.store import AdapterStore, StoreCounters, StoreError
from surgery_adaption_prompt.text_init import prompts_from_text
from surgery_adaption_prompt.trainable_copy import TrainableCopyOperation

__version__ = "0.1.0"

__all__ = [
    "AdaptedAttention",
    "AdapterStatus",
    "AdapterStore",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "AdaptionPromptOperation",
    "Composition",
    "FixedRows",
    "ModelStatus",
    "StoreCounters",
    "StoreError",
    "TrainableCopyOperation",
    "activate_gate",
    "adapter_state",
    "adapter_status",
    "base_fingerprint",
    "check_base",
    "conditioned",
    "draw_gates",
    "gated_prompt_attention",
    "get_peft_model",
    "load_state_",
    "model_status",
    "prompts_from_text",
    "read_litgpt",
    "read_llama_adapter",
]
