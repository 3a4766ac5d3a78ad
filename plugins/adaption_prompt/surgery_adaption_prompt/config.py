"""What an adapter is made of: PEFT's fields, ours, and the checks that need no model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from surgery_core import OptionsError, listed

PEFT_TYPE = "ADAPTION_PROMPT"
OWN_TYPE = "SURGERY_ADAPTION_PROMPT"
"""What `peft_type` is on disk where PEFT would load the adapter and compute something else."""

CLASSIFICATION_HEADS: Mapping[str | None, Sequence[str]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}
"""Names, by task type, under which PEFT looks for a head to train when none is given."""

TASK_TYPES = (
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
)
"""PEFT's task types; it refuses others."""

PEFT_FIELDS = frozenset(
    {
        "adapter_layers",
        "adapter_len",
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""Fields that PEFT 0.21.2 reads and writes for this method."""

DEFAULT_CONDITION_RANK = 16
MIN_ITEMSIZE = 2
"""Bytes of the narrowest dtype that prompts may have."""

Gate = Literal["layer", "head"]
GateActivation = Literal["identity", "tanh"]


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of `AdaptionPromptConfig`, for editors of recipes."""
    text, flag = {"type": ["string", "null"]}, {"type": "boolean"}
    count = {"type": "integer", "minimum": 1}
    special: dict[str, Mapping[str, Any]] = {
        "peft_type": {"enum": [PEFT_TYPE, None]},
        "auto_mapping": {"type": ["object", "null"]},
        "inference_mode": flag,
        "adapter_len": {**count, "description": "Length of each prompt, in tokens."},
        "adapter_layers": {**count, "description": "Layers adapted, counted from the top."},
        "gate": {"enum": list(get_args(Gate))},
        "gate_activation": {"enum": list(get_args(GateActivation))},
        "condition_size": {
            **count,
            "type": ["integer", "null"],
            "description": "Features for each row that the prompts depend on; null for none.",
        },
        "condition_rank": {**count, "description": "Rank of what projects them, in each layer."},
        "project_output": flag,
        "task_type": {"enum": [*TASK_TYPES, None]},
        "modules_to_save": {"type": ["array", "null"], "items": {"type": "string"}},
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            field.name: dict(special.get(field.name, text))
            for field in fields(AdaptionPromptConfig)
        },
    }


@dataclass(frozen=True)
class AdaptionPromptConfig:
    """Configuration of one adapter; the first nine fields are PEFT's, in PEFT's order.

    Args:
        peft_type: `"ADAPTION_PROMPT"`; None means the same.
        auto_mapping: Kept for PEFT, not used here.
        base_model_name_or_path: Name of the base model, for the record.
        revision: Revision of the base model, for the record.
        task_type: PEFT's task name, one of `TASK_TYPES`, for example `"CAUSAL_LM"`; or None.
        inference_mode: The adapter is frozen.
        target_modules: Name of the attention modules, for example `"self_attn"`; or a pattern of
            their whole FQNs with `*`, for models with several stacks of layers, for example
            `"model.language_model.layers.*.self_attn"`. None finds them.
        adapter_len: K, the length of each adaption prompt, in tokens. Required, at least 1.
        adapter_layers: L, how many layers are adapted, counted from the top. Required, at least 1.
        gate: One gate for each layer (`"layer"`, shape `(1,)`, as PEFT) or for each attention head
            (`"head"`, shape `(num_attention_heads,)`, as the paper and LLaMA-Adapter).
        gate_activation: What is applied to the gate before use; zero stays zero.
        dtype: Of prompt and gate, for example `"bfloat16"`; None means float32, or the base's
            own dtype where that is wider.
        project_output: The prompt's term goes through the output projection, as in the paper.
            False adds it after that, as PEFT does for GPT-2, with PEFT's scaling.
        modules_to_save: Names of modules to train whole and keep with the adapter, for example
            `["score"]`. None means the classification head if `task_type` is `"SEQ_CLS"` or
            `"TOKEN_CLS"`, otherwise nothing.
        init_from_text: Start the prompts from what each layer sees of this text, at most
            `adapter_len` tokens, not from random values; see `prompts_from_text`.
        condition_size: How many features, of an image for example, each row of a batch comes with;
            a projection of them is added to the prompt. See `conditioned`. None for none.
        condition_rank: Rank of that projection, at least 1; needs `condition_size`.

    Raises:
        OptionsError: A field is missing or out of its range.

    Example:
        >>> AdaptionPromptConfig(adapter_len=10, adapter_layers=30).peft_type
        'ADAPTION_PROMPT'
    """

    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    target_modules: str | None = None
    # PEFT's signature has None here; it is refused below, so that the type needs no None.
    adapter_len: int = None  # type: ignore[assignment]
    adapter_layers: int = None  # type: ignore[assignment]
    gate: Gate = "layer"
    gate_activation: GateActivation = "identity"
    dtype: str | None = None
    project_output: bool = True
    modules_to_save: Sequence[str] | None = None
    init_from_text: str | None = None
    condition_size: int | None = None
    condition_rank: int = DEFAULT_CONDITION_RANK

    def __post_init__(self) -> None:
        # PEFT's enums are strings; keep the bare string, so that JSON and == need no PEFT.
        for name in ("peft_type", "task_type"):
            value = getattr(self, name)
            object.__setattr__(self, name, str.__str__(value) if isinstance(value, str) else value)
        if self.peft_type in (None, OWN_TYPE):
            object.__setattr__(self, "peft_type", PEFT_TYPE)
        if isinstance(self.modules_to_save, list):
            object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        problems = [*self._type_problems(), *self._range_problems()]
        if problems:
            msg = f"AdaptionPromptConfig is invalid: {'; '.join(problems)}."
            raise OptionsError(msg)

    def _type_problems(self) -> list[str]:
        expected: dict[str, type | tuple[type, ...]] = {
            "auto_mapping": (dict, type(None)),
            "base_model_name_or_path": (str, type(None)),
            "revision": (str, type(None)),
            "inference_mode": bool,
            "target_modules": (str, type(None)),
            "dtype": (str, type(None)),
            "project_output": bool,
            "modules_to_save": (tuple, type(None)),
            "init_from_text": (str, type(None)),
        }
        problems = [
            f"{name} has the wrong type, got {getattr(self, name)!r}"
            for name, kind in expected.items()
            if not isinstance(getattr(self, name), kind)
        ]
        names = self.modules_to_save
        if isinstance(names, tuple) and not all(isinstance(x, str) and x for x in names):
            problems.append(f"modules_to_save must hold names, got {names!r}")
        return problems

    def _range_problems(self) -> list[str]:
        problems = [
            f"{name} must be an integer of at least 1, got {value!r}"
            for name, value in (
                ("adapter_len", self.adapter_len),
                ("adapter_layers", self.adapter_layers),
                ("condition_size", 1 if self.condition_size is None else self.condition_size),
                ("condition_rank", self.condition_rank),
            )
            if not isinstance(value, int) or isinstance(value, bool) or value < 1
        ]
        if self.condition_size is None and self.condition_rank != DEFAULT_CONDITION_RANK:
            problems.append(
                f"condition_rank={self.condition_rank!r} needs condition_size, got None"
            )
        for name, value, allowed in (
            ("peft_type", self.peft_type, (PEFT_TYPE,)),
            ("task_type", self.task_type, (*TASK_TYPES, None)),
            ("gate", self.gate, ("layer", "head")),
            ("gate_activation", self.gate_activation, ("identity", "tanh")),
        ):
            if value not in allowed:
                problems.append(f"{name} must be one of {listed(allowed, most=9)}, got {value!r}")
        if isinstance(self.dtype, str):
            found = getattr(torch, self.dtype, None)
            # Narrower ones can hold values, and not be computed with.
            if not (
                isinstance(found, torch.dtype)
                and found.is_floating_point
                and found.itemsize >= MIN_ITEMSIZE
            ):
                problems.append(
                    "dtype must name a floating-point torch dtype of at least 16 bits, got "
                    f"{self.dtype!r}"
                )
        return problems

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "AdaptionPromptConfig":
        """Build from a mapping, refusing keys that are no fields.

        Raises:
            OptionsError: See the class; or a key is unknown.
        """
        given: object = values
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            msg = f"AdaptionPromptConfig cannot be made of {given!r:.80}: expected values by field name."
            raise OptionsError(msg)
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            msg = (
                f"AdaptionPromptConfig has no field {listed(unknown)}: expected some of "
                f"{listed([field.name for field in fields(cls)], most=20)}. Fix the spelling."
            )
            raise OptionsError(msg)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return PEFT's fields, and those of ours that differ from their defaults."""
        ours = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name in PEFT_FIELDS or value != ours[name]
        }
