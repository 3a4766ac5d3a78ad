"""What `AdaptionPromptModel` offers of its base: everything but the base's own adapter methods."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Self, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery_adaption_prompt.architectures import (
    BASE_ADAPTER_METHODS,
    Contexts,
    enable_checkpointing,
    recompute_in,
    without_block_sharing,
)
from surgery_adaption_prompt.condition import check_features, check_fit, conditioned
from surgery_adaption_prompt.selection import Choice, check_num_rows
from surgery_core import OptionsError, Sharing


class BaseFacade(nn.Module):
    """Wraps a model, and answers for it; abstract.

    Args:
        model: The base model.
    """

    sharing: Sharing

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def activated(self, adapters: Choice | Sequence[Choice]) -> AbstractContextManager[Self]:
        """Use adapters in this thread or asyncio task only."""

    @abstractmethod
    def condition_sizes(self) -> Mapping[str, int]:
        """Return the conditioned adapters that the running code uses, with their `condition_size`."""

    @abstractmethod
    def num_adapters(self) -> int:
        """Return how many adapters there are."""

    @abstractmethod
    def recompute_contexts(self) -> Contexts:
        """Return contexts for a checkpointed forward, and for doing it again."""

    def forward(
        self,
        *args: Any,  # noqa: ANN401 (the base's own signature)
        adapter_names: Sequence[Choice] | None = None,
        condition: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401 (same)
    ) -> Any:  # noqa: ANN401 (same)
        """Run the base model with the active adapter; arguments and result are the base's.

        Args:
            *args: The base's.
            adapter_names: What each row gets instead; see `activated`.
            condition: Features for conditioned adapters, `(rows, condition_size)`; see `conditioned`.
            **kwargs: The base's.

        Raises:
            OptionsError: There is not one name for each row; or there are features that fit neither
                batch nor adapter, or that no adapter takes.
            VariantError: There is no such adapter.
        """
        if adapter_names is None and condition is None:
            return self.model(*args, **kwargs)
        with self._given(adapter_names, condition, args, kwargs):
            return self.model(*args, **kwargs)

    def generate(
        self,
        *args: Any,  # noqa: ANN401 (the base's own signature)
        adapter_names: Sequence[Choice] | None = None,
        condition: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401 (same)
    ) -> Any:  # noqa: ANN401 (same)
        """Generate with the active adapter, or with one for each row; see `forward`."""
        with self._given(adapter_names, condition, args, kwargs):
            return cast("Any", self.model).generate(*args, **kwargs)

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: Any = None,  # noqa: ANN401 (the base's own)
        continuous_batching_config: Any = None,  # noqa: ANN401 (same)
        **kwargs: Any,  # noqa: ANN401 (same)
    ) -> Any:  # noqa: ANN401 (same)
        """Generate by continuous batching, all requests with the active adapter; arguments are the base's.

        It runs in a thread, which `activated` does not reach. Requests that begin alike share keys of
        their texts only where no other adapter, and no adapter, can have answered before.

        Raises:
            OptionsError: `adapter_names` is given, or `activated` is open.
        """
        self._require_active_for_all(kwargs)
        if self.num_adapters() > 1 or kwargs.get("persistent_manager"):
            continuous_batching_config = without_block_sharing(
                continuous_batching_config, generation_config
            )
        return cast("Any", self.model).generate_batch(
            inputs, generation_config, continuous_batching_config, **kwargs
        )

    def init_continuous_batching(
        self,
        generation_config: Any = None,  # noqa: ANN401 (the base's own)
        continuous_batching_config: Any = None,  # noqa: ANN401 (same)
        **kwargs: Any,  # noqa: ANN401 (same)
    ) -> Any:  # noqa: ANN401 (same)
        """Return the base's manager of continuous batching; see `generate_batch`."""
        self._require_active_for_all(kwargs)
        config = without_block_sharing(continuous_batching_config, generation_config)
        return cast("Any", self.model).init_continuous_batching(generation_config, config, **kwargs)

    def continuous_batching_context_manager(
        self,
        generation_config: Any = None,  # noqa: ANN401 (the base's own)
        block: bool = True,  # noqa: FBT001, FBT002 (same)
        timeout: float | None = None,
        continuous_batching_config: Any = None,  # noqa: ANN401 (same)
        **kwargs: Any,  # noqa: ANN401 (same)
    ) -> Any:  # noqa: ANN401 (same)
        """Return the base's context with a manager of continuous batching; see `generate_batch`."""
        self._require_active_for_all(kwargs)
        config = without_block_sharing(continuous_batching_config, generation_config)
        return cast("Any", self.model).continuous_batching_context_manager(
            generation_config, block, timeout, config, **kwargs
        )

    def _require_active_for_all(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse adapters that the thread of continuous batching would not get."""
        if "adapter_names" in kwargs or self.sharing.used() is not None:
            msg = (
                "Continuous batching runs in a thread of its own, with the active adapter for all "
                "requests: adapter_names and activated(...) do not reach it. Call set_adapter before, "
                "or generate with adapter_names."
            )
            raise OptionsError(msg)

    @contextmanager
    def _given(
        self,
        adapter_names: Sequence[Choice] | None,
        condition: Tensor | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Iterator[None]:
        """Give the code inside what a call was given for its rows, after checking it."""
        with ExitStack() as stack:
            if adapter_names is not None:
                check_num_rows(adapter_names, args, kwargs)
                stack.enter_context(self.activated(adapter_names))
            if condition is not None:
                check_features(condition)
                # After the names: they say who takes the features.
                self._check_condition(condition, _num_rows(args, kwargs))
                stack.enter_context(conditioned(condition))
            yield

    def _check_condition(self, condition: Tensor, batch: int | None) -> None:
        sizes = self.condition_sizes()
        if not sizes:
            msg = (
                "condition has no effect: expected an adapter with condition_size that is active, "
                "got none. Activate one, or leave condition out."
            )
            raise OptionsError(msg)
        for size in sizes.values():
            check_fit(condition, size=size, batch=batch)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the base has)
        """Look up in the base what is not here, as PEFT does, but for its own adapter methods.

        Raises:
            AttributeError: The base has not got it either, or it is a method for other adapters.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = vars(self).get("_modules", {}).get("model")
            if model is None:
                raise
        if name in BASE_ADAPTER_METHODS:
            msg = (
                f"AdaptionPromptModel has no {name!r}: the base's method of that name manages "
                "adapters of PEFT's. Call it on get_base_model() if that is meant."
            )
            raise AttributeError(msg)
        return getattr(model, name)

    @property
    def base_model(self) -> Self:
        """This model: in PEFT it is one further inside, so `base_model.model` is the base in both."""
        return self

    def get_base_model(self) -> PreTrainedModel:
        """Return the model that was passed in, with the active adapter's modules in it."""
        return self.model

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401 (the base's own)
    ) -> None:
        """Recompute activations in the backward pass; arguments are those of the base's method.

        Unlike the base's, it recomputes with the adapters of the forward pass, whatever is active
        by then, and lets no gradient through the embeddings, so that layers below the adapted ones
        are not differentiated; both take `use_reentrant=False`, the default.
        """
        given = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        enable_checkpointing(self.model, given, **kwargs)
        if given["use_reentrant"]:
            return
        if "context_fn" not in given:
            recompute_in(self.model, self.recompute_contexts)
        cast("Any", self.model).disable_input_require_grads()

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401 (the base's own)
    ) -> None:
        """Do what `activation_checkpointing_enable` does; the name it had before transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many values are trained, and how many there are, in the model as it is."""
        parameters = list(self.model.parameters())
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return trainable, sum(parameter.numel() for parameter in parameters)

    def trainable_summary(self) -> str:
        """Return the line PEFT's `print_trainable_parameters` prints."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        return (
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    def print_trainable_parameters(self) -> None:
        """Print `trainable_summary`."""
        print(self.trainable_summary())  # noqa: T201 (what its name promises)


def _num_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Return how many rows a model's input has; None if it is not found."""
    inputs = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
    return next((found.shape[0] for found in inputs if isinstance(found, Tensor)), None)
