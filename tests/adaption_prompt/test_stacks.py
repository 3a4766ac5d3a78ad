"""The topmost layers are those of the text decoder, whatever other stacks of layers a model has."""

import pytest
import torch
import transformers
from surgery_adaption_prompt import AdaptionPromptConfig
from surgery_adaption_prompt.operation import AdaptionPromptOperation

from surgery_core import NoMatchError, OptionsError

pytestmark = pytest.mark.filterwarnings("ignore")


def chosen(name, layers, **options):
    """Return what is adapted of a model with its default sizes, which takes no memory."""
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    tree = dict(model.named_modules())
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=layers, **options)
    return AdaptionPromptOperation().targets(tree, config).select(tree)


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, "self_attn"])
@pytest.mark.parametrize(
    ("name", "place", "last"),
    [
        ("VoxtralRealtimeForConditionalGeneration", "model.language_model.layers", 25),
        ("KyutaiSpeechToTextForConditionalGeneration", "model.layers", 47),
        ("SeamlessM4TForTextToSpeech", "text_decoder.layers", 23),
        ("CsmForConditionalGeneration", "backbone_model.layers", 15),
        ("IdeficsForVisionText2Text", "model.layers", 31),
        ("T5ForConditionalGeneration", "decoder.block", 5),
        ("GPT2LMHeadModel", "transformer.h", 11),
        ("LlamaForSequenceClassification", "model.layers", 31),
    ],
)
def test_the_topmost_layers_are_those_of_the_text_decoder(name, place, last, target):
    names = {"T5": "SelfAttention", "GP": "attn"}
    target = target and names.get(name[:2], target)

    found = chosen(name, 3, target_modules=target)

    assert {f"{place}.{number}" for number in range(last - 2, last + 1)} == {
        ".".join(fqn.split(".")[: len(place.split(".")) + 1]) for fqn in found
    }


@pytest.mark.slow
def test_which_of_several_stacks_must_be_said():
    name, place = "Qwen2_5OmniForConditionalGeneration", "thinker.model.language_model.layers"
    with pytest.raises(OptionsError) as caught:
        chosen(name, 20)
    assert str(caught.value) == (
        "adapter_layers counts the layers of one stack: this model has several, got "
        "'talker.model.layers.*.self_attn', 'thinker.model.language_model.layers.*.self_attn'. Pass "
        "one of these patterns as target_modules."
    )
    with pytest.raises(OptionsError, match="this model has several"):
        chosen(name, 2, target_modules="**.self_attn")
    with pytest.raises(OptionsError, match="must be between 1 and 28"):
        chosen(name, 40, target_modules=f"{place}.*.self_attn")
    with pytest.raises(NoMatchError, match="names no attention module"):
        chosen(name, 2, target_modules="elsewhere.*.self_attn")

    found = chosen(name, 2, target_modules=f"{place}.*.self_attn")

    assert {f"{place}.{number}.self_attn" for number in (26, 27)} == found
