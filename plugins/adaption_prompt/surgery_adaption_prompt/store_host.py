"""The model that a store loads adapters into, as the store sees it."""

import os
from collections.abc import Mapping
from typing import Protocol

from surgery_adaption_prompt.base_check import BaseCheck


class Host(Protocol):
    """A model that takes adapters in and gives them up, as `AdaptionPromptModel` does.

    A store calls all of this while it holds its lock, so a lock of the host's own must not be held
    by a thread that waits for the store.
    """

    @property
    def peft_config(self) -> Mapping[str, object]:
        """Configurations of its adapters by name; new objects for those that got other values."""

    def add_from_folder(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *,
        is_trainable: bool = False,
        base_check: BaseCheck = "warn",
    ) -> None:
        """Add an adapter from a folder, not in use; after an error nothing was added."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""

    def adapter_bytes(self, adapter_name: str) -> int:
        """Return how many bytes the tensors take that deleting an adapter would free."""

    def is_in_use(self, adapter_name: str) -> bool:
        """Tell whether an adapter is selected, or part of what is active or computed now."""
