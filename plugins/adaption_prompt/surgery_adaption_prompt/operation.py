"""The rule that adapts the topmost attention modules, as an operation of the core."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from surgery_adaption_prompt import trainable_copy
from surgery_adaption_prompt.architectures import (
    architecture_of,
    attention_modules,
    refused_reason,
)
from surgery_adaption_prompt.attention import AdaptedAttention, adapt, compose, parameter_dtype
from surgery_adaption_prompt.checkpoints import AdapterFolder
from surgery_adaption_prompt.composition import Composition, composed_adapters
from surgery_adaption_prompt.condition import conditioned
from surgery_adaption_prompt.config import (
    CLASSIFICATION_HEADS,
    AdaptionPromptConfig,
    config_schema,
)
from surgery_adaption_prompt.folders import SavableAdapter, config_for, write_adapters
from surgery_adaption_prompt.importers import read_litgpt, read_llama_adapter
from surgery_adaption_prompt.parts import parameter_shapes
from surgery_adaption_prompt.rows import SharedTerms
from surgery_adaption_prompt.stacks import one_stack
from surgery_core import (
    BoundRule,
    Composed,
    Effects,
    Glob,
    NoMatchError,
    Operation,
    OptionsError,
    Rule,
    Saved,
    Selector,
    Site,
    TensorSpec,
    Tree,
    WeightedModule,
    WeightedVariant,
    Where,
    execution_device,
    listed,
    modules_of,
)

NAME = "adaption_prompt"


class AdaptionPromptOperation(Operation[AdaptionPromptConfig]):
    """Add an adaption prompt to the top L attention modules; options as `AdaptionPromptConfig`."""

    name = NAME
    summary = "LLaMA-Adapter: learned prompts with a zero-initialised gate in the top L layers."
    keeps_children = True

    def parse_options(self, options: Mapping[str, Any]) -> AdaptionPromptConfig:
        """Validate the options as an `AdaptionPromptConfig`.

        Raises:
            OptionsError: A field is unknown, missing or out of its range, or concerns more than
                the attention modules.
        """
        config = AdaptionPromptConfig.from_mapping(options)
        if config.modules_to_save is not None or config.init_from_text is not None:
            msg = (
                f"Operation {NAME!r} adapts attention modules only: expected neither "
                "modules_to_save nor init_from_text. Add a rule with the operation "
                "'trainable_copy', and use AdaptionPromptModel to start from a text."
            )
            raise OptionsError(msg)
        return config

    def targets(self, tree: Tree, options: AdaptionPromptConfig) -> Selector:
        """Choose the `adapter_layers` topmost attention modules.

        Raises:
            NoMatchError: There are none, or none of the name `target_modules`.
            OptionsError: There are fewer than `adapter_layers`, or several stacks of layers.
        """
        found = attention_modules(tree)
        if not found:
            msg = (
                f"Operation {NAME!r} found no attention module among {len(tree)} submodules: "
                "expected modules that use transformers' attention interface. Pass a decoder of "
                "transformers 5."
            )
            raise NoMatchError(msg, selector=NAME, candidates=())
        target = options.target_modules
        is_pattern = target is not None and "*" in target
        if is_pattern:
            matched = Glob(str(target)).select(tree)
            chosen = [fqn for fqn in found if fqn in matched]
        else:
            chosen = [fqn for fqn in found if target is None or f".{fqn}".endswith(f".{target}")]
        if not chosen:
            names = sorted({fqn.rpartition(".")[2] for fqn in found})
            msg = (
                f"target_modules {target!r} names no attention module: this model calls them "
                f"{listed(names)}. Use that name, or leave target_modules out."
            )
            raise NoMatchError(msg, selector=str(target), candidates=names)
        # What is refused for its class is refused below, with the reason.
        if not any(refused_reason(found[fqn]) for fqn in chosen):
            chosen = one_stack(tree, chosen, named=is_pattern)
        if options.adapter_layers > len(chosen):
            msg = (
                f"adapter_layers must be between 1 and {len(chosen)} (attention modules of this "
                f"model), got {options.adapter_layers}."
            )
            raise OptionsError(msg)
        top = frozenset(chosen[-options.adapter_layers :])
        return Where(
            lambda fqn, _: fqn in top, f"the top {len(top)} of {len(chosen)} attention modules"
        )

    def describe(self, site: Site, options: AdaptionPromptConfig) -> Effects:
        """Return the tensors that are added: prompt and gate, and what projects features.

        Raises:
            ContractError: The module cannot be adapted, or is adapted already.
        """
        hidden, heads = architecture_of(site.module, fqn=site.fqn).sizes(site.module)
        dtype = str(parameter_dtype(site.module, options)).removeprefix("torch.")
        trainable = not options.inference_mode
        shapes = parameter_shapes(options, hidden=hidden, heads=heads)
        return Effects(
            added=tuple(
                TensorSpec(name=name, shape=shape, dtype=dtype, trainable=trainable)
                for name, shape in shapes.items()
            )
        )

    def build(self, site: Site, options: AdaptionPromptConfig) -> AdaptedAttention:
        """Return the attention module of the site, wrapped."""
        architecture = architecture_of(site.module, fqn=site.fqn)
        return adapt(site.module, architecture, options, device=execution_device(site.module))

    def options_schema(self) -> Mapping[str, Any]:
        """Return the JSON Schema of `AdaptionPromptConfig`."""
        return config_schema()

    def compose(self, variants: Sequence[WeightedVariant]) -> Composed:
        """Return the weighted sum of their terms.

        Raises:
            OptionsError: A weight is not finite, or an adapter cannot be active beside others.
        """
        weights = {variant.name: variant.weight for variant in variants}
        return composed_adapters(Composition(weights), modules_of(variants, AdaptedAttention))

    def probing(self, options: AdaptionPromptConfig) -> AbstractContextManager[None]:
        """Hand over a row of features from -1 to 1, if the prompts are conditioned."""
        if options.condition_size is None:
            return nullcontext()
        return conditioned(torch.linspace(-1, 1, options.condition_size)[None])

    def listener(self, site: Site) -> AdaptedAttention:
        """Return the attention module of the site, wrapped without a prompt."""
        return compose(site.module, architecture_of(site.module, fqn=site.fqn), [], {})

    def shared(self, site: Site, rows: Sequence[Sequence[WeightedModule]]) -> SharedTerms:
        """Return the terms of the rows' adapters.

        Raises:
            OptionsError: An adapter adds its term where modules of others would not ask for it; or a
                conditioned one is among several.
        """
        for one in (one for row in rows for one in row):
            module = cast("AdaptedAttention", one.module)
            (part,) = module.prompts
            if not part.config.project_output and not module.architecture.may_skip_projection(
                module
            ):
                msg = (
                    f"Adapter {one.name!r} cannot be used beside others: expected "
                    f"project_output=True at {site.fqn!r} for {type(site.module).__name__}. Make it "
                    "the active one."
                )
                raise OptionsError(msg)
            if len(rows) > 1 and part.config.condition_size is not None:
                msg = (
                    f"Conditioned adapter {one.name!r} cannot share a batch with others at "
                    f"{site.fqn!r}: expected adapters without condition_size for such rows. Give the "
                    "whole batch this one."
                )
                raise OptionsError(msg)
        return SharedTerms(rows)

    def read_saved(self, source: str, model: nn.Module, options: Mapping[str, Any]) -> Saved | None:
        """Read PEFT's and our folders, and the files of LLaMA-Adapter V1 and litgpt.

        A file of LLaMA-Adapter needs the options `adapter_len` and `gate_activation`.

        Raises:
            SurgeryError: See `read_llama_adapter`, `read_litgpt` and `AdapterFolder`.
        """
        path = Path(source)
        if path.is_dir():
            found = AdapterFolder.read(path)
            config, state = config_for(model, found, is_trainable=False), found.state
        elif not path.is_file():
            return None
        elif {"adapter_len", "gate_activation"} <= options.keys():
            config, state = read_llama_adapter(
                path,
                model,
                adapter_len=options["adapter_len"],
                gate_activation=options["gate_activation"],
            )
        else:
            config, state = read_litgpt(path, model)
        values = {**config.to_mapping(), **options}
        return Saved(options=values, state=state)

    def write_saved(
        self, folder: str, options: Mapping[str, Any], modules: Mapping[str, nn.Module]
    ) -> None:
        """Write a folder in PEFT's format, as `AdaptionPromptModel.save_pretrained` does.

        Raises:
            StateError: A value is not finite; nothing was written.
        """
        config = self.parse_options(options)
        write_adapters(
            {Path(folder): SavableAdapter.prepare(folder, config, modules, for_peft=False)}
        )


def adapter_rules(model: nn.Module, config: AdaptionPromptConfig) -> list[BoundRule]:
    """Return the rules that make up an adapter: its prompts, and copies of modules trained whole.

    Args:
        model: The base, in which a head to train is looked for if the configuration asks for one.
        config: Configuration of the adapter.
    """
    prompts = replace(config, modules_to_save=None, init_from_text=None).to_mapping()
    rules = [
        BoundRule(rule=Rule(operation=NAME, options=prompts), operation=AdaptionPromptOperation())
    ]
    names = config.modules_to_save
    if names is None:
        heads = CLASSIFICATION_HEADS.get(config.task_type, ())
        tree = dict(model.named_modules()) if heads else {}
        names = tuple(name for name in heads if trainable_copy.named(tree, [name]))
    if names:
        copies = {"modules": names, "is_trainable": not config.inference_mode}
        rules.append(
            BoundRule(
                rule=Rule(operation=trainable_copy.NAME, options=copies),
                operation=trainable_copy.TrainableCopyOperation(),
            )
        )
    return rules
