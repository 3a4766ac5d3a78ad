"""Folders of adapters, a host that only has them, and a plain model of what a store keeps."""

import copy
import time
from pathlib import Path

import torch
from surgery_adaption_prompt import AdaptionPromptConfig
from surgery_adaption_prompt.checkpoints import save_adapter
from surgery_adaption_prompt.store import StoreCounters, StoreError

from surgery_core import StateError, SurgeryError

CONFIG = AdaptionPromptConfig(adapter_len=1, adapter_layers=1)
VALUES = {name: number for number, name in enumerate("abcdef", start=1)}
"""How many values each adapter has; on disk and in float32, four bytes each."""


class FakeHost:
    """Has adapters and computes nothing; what takes four bytes on disk takes `width` here."""

    def __init__(self):
        self.peft_config = {}
        self.used, self.broken, self.wide = set(), set(), set()
        self.calls = []
        # Of the base; those of adapters that have not followed it are kept by name.
        self.width = 4
        self.widths = {}
        self.is_entered = False

    def add_from_folder(self, model_id, adapter_name, *, is_trainable=False, base_check="warn"):
        assert not self.is_entered, "two threads at once"
        self.is_entered = True
        time.sleep(0)
        assert adapter_name not in self.peft_config
        assert adapter_name == Path(model_id).name
        assert not is_trainable
        self.is_entered = False
        if adapter_name in self.broken:
            msg = f"{adapter_name} does not fit"
            raise StateError(msg)
        self.calls.append(("load", adapter_name, base_check))
        self.add(adapter_name)

    def add(self, name):
        """Add an adapter, by hand where the store does not call it."""
        self.peft_config[name] = copy.copy(CONFIG)
        self.follow(name)

    def move(self, width, *, is_base_alone):
        """Take another dtype; of the base alone, adapters follow when they are used."""
        self.widths = {n: self.widths.get(n, self.width) for n in self.peft_config}
        if not is_base_alone:
            self.widths.clear()
        self.width = width

    def follow(self, name):
        """Take an adapter where the base went."""
        self.widths.pop(name, None)

    def delete_adapter(self, name):
        self.calls.append(("delete", name))
        del self.peft_config[name]

    def adapter_bytes(self, name):
        width = self.widths.get(name, self.width) if name in self.peft_config else self.width
        return (8 if name in self.wide else width) * VALUES[name]

    def is_in_use(self, name):
        return name in self.used


def write(folder, name):
    """Write an adapter as `save_pretrained` does."""
    save_adapter(folder / name, CONFIG, {"l.adaption_prompt": torch.zeros(1, VALUES[name], 1)})


def filled(folder):
    """Write all adapters to a folder, and return it."""
    for name in VALUES:
        write(folder, name)
    return folder


class PlainStore:
    """What a store has loaded and counted, as a list of names and plain sums.

    Args:
        budget: What loaded adapters may take, in bytes; None for any number.
        on_disk: Returns what an adapter takes by its file.
        in_model: Returns what it takes once it is loaded.
    """

    def __init__(self, budget, *, on_disk, in_model):
        self.budget = budget
        self.on_disk, self.in_model = on_disk, in_model
        self.order = []
        self.damaged, self.broken = set(), set()
        self.hits = self.misses = self.evictions = 0

    def ask(self, wanted, *, present, staying):
        """Do what asking for these adapters does; return the error to expect.

        Args:
            wanted: Names, in the order in which they are asked for.
            present: Names of adapters that the model has.
            staying: Names of those that must not be evicted.
        """
        missing = [name for name in wanted if name not in present]
        hits = [name for name in wanted if name in self.order]
        if self.damaged & set(missing):
            return SurgeryError
        staying = {*wanted, *staying}
        if missing and self._victims(staying, sum(map(self.on_disk, missing))) is None:
            return StoreError
        steps = [(name, self.on_disk(name)) for name in missing]
        for name, extra in [*steps, (None, 0)] if steps else []:
            gone = self._victims(staying, extra)
            self.evict(gone or [])
            if gone is None or name in self.broken:
                self.order = [other for other in self.order if other not in missing]
                return StoreError if gone is None else StateError
            self.order += [name] if name else []
        asked = [name for name in wanted if name in self.order]
        self.order = [name for name in self.order if name not in asked] + asked
        self.hits += len(hits)
        self.misses += len(missing)
        return None

    def evict(self, names):
        self.forget(names)
        self.evictions += len(names)

    def forget(self, names):
        """Note that adapters are no longer the store's."""
        self.order = [name for name in self.order if name not in names]

    @property
    def counters(self):
        return StoreCounters(
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
            num_loaded=len(self.order),
            num_bytes=sum(map(self.in_model, self.order)),
        )

    def _victims(self, staying, extra):
        """Return whom to evict for so many more bytes, the oldest first; None if it is not enough."""
        used = extra + sum(map(self.in_model, self.order))
        gone = []
        for name in self.order:
            if self.budget is None or used <= self.budget:
                break
            if name not in staying:
                used -= self.in_model(name)
                gone.append(name)
        return gone if self.budget is None or used <= self.budget else None
