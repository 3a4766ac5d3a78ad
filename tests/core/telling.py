"""A plugin that speaks of what it is given in every way that fails, if it is told to."""

import warnings
from pathlib import Path

from core.cli_toys import make
from core.toys import Gate
from pydantic import BaseModel

from surgery_core import OptionsError, RecipeError, SurgeryWarning, hookimpl

SECRET = "s3cr3t-'\"\\é" + "x" * 90
"""Quotes, a backslash and an umlaut, which messages escape; and longer than they go."""

PLUGIN = "from core.telling import Plugin\n\nplugin = Plugin()\n"


class Whole(BaseModel, extra="forbid"):
    number: int


class Telling(Gate):
    """Keeps what it is given, and speaks of it in every way that fails, if it is told to."""

    name = "telling"
    seen = ()

    def parse_options(self, options):
        type(self).seen = (*self.seen, dict(options))
        word = options.get("word")
        if word == ["list", SECRET]:
            warnings.warn(f"word is {word}", SurgeryWarning, stacklevel=1)
        elif options.get("fail") == "refuse":
            msg = f"word is {word!r:.80}."
            raise OptionsError(msg)
        elif options.get("fail") == "attributes":
            msg = f"word is {word}"
            raise RecipeError(msg, problems=[f"one {word}", f"two {word!r}"])
        elif options.get("fail") == "pydantic":
            Whole(number=word)
        elif options.get("fail") == "cause":
            try:
                {}[word]
            except KeyError as err:
                msg = "Word is unknown."
                raise OptionsError(msg) from err
        elif options.get("fail") == "file":
            Path(word).read_text()
        return options

    def build(self, site, options):
        if options.get("fail") == "build":
            msg = f"cannot build with {options}"
            raise OptionsError(msg)
        return super().build(site, {})

    def read_saved(self, source, _model, options):
        msg = f"There is nothing in {source!r} for {options}"
        raise OptionsError(msg)

    def write_saved(self, _folder, options, _modules):
        msg = f"cannot be written: {options['word']!r}"
        raise OptionsError(msg)


class Plugin:
    @hookimpl
    def surgery_operations(self):
        return [Telling()]

    @hookimpl
    def surgery_load_skeleton(self, source):
        return self.surgery_load_model(source)

    @hookimpl
    def surgery_load_model(self, source):
        if "broken" in source:
            msg = f"Model {source!r} is broken, see {Path(source).parent}"
            raise OptionsError(msg)
        return make() if source.endswith("net") else None

    @hookimpl
    def surgery_probe_inputs(self, model):
        return {"x": next(model.parameters()).new_ones(2, 4)}
