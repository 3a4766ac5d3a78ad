"""Files of settings are what their model says, or every problem is named with its line."""

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from surgery_core import RecipeError, load_settings


class Data(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    train: str
    limit: int = Field(default=1, ge=1)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    data: Data
    rate: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    mode: Literal["a", "b"] = "a"
    tags: dict[str, int] = {}

    @field_validator("mode")
    @classmethod
    def _known(cls, mode):
        if mode == "b":
            msg = "expected 'a' today"
            raise ValueError(msg)
        return mode


def refused(tmp_path, text, name="s.yaml"):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_settings(path, Settings)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.yaml", "data: {train: x}\nrate: 1e-3\n"),
        ("s.toml", 'rate = 1e-3\n[data]\ntrain = "x"\n'),
        ("s.json", '{"data": {"train": "x"}, "rate": 1e-3}'),
    ],
)
def test_settings_are_read_from_every_format(tmp_path, name, text):
    (tmp_path / name).write_text(text)

    assert Settings(data=Data(train="x"), rate=1e-3) == load_settings(tmp_path / name, Settings)


def test_every_problem_is_named_with_its_line(tmp_path):
    text = "data:\n  trian: x\n  limit: 0\nrate: nan\nmode: c\nwhat: 1\n"

    assert refused(tmp_path, text.replace("nan", ".inf")) == [
        "s.yaml:1: data: expected 'train', got no such key",
        "s.yaml:3: data.limit: expected at least 1, got 0",
        "s.yaml:2: data: unknown key 'trian': did you mean 'train'?",
        "s.yaml:4: rate: expected a finite number, got inf",
        "s.yaml:5: mode: expected 'a' or 'b', got 'c'",
        "s.yaml:6: unknown key 'what': expected one of 'data', 'rate', 'mode', 'tags'",
    ]


def test_values_of_another_kind_and_what_validators_say(tmp_path):
    text = "data: {train: 3}\nrate: fast\nmode: b\ntags: {x: y}\n"

    assert refused(tmp_path, text) == [
        "s.yaml:1: data.train: expected text, got 3",
        "s.yaml:2: rate: expected a number, got 'fast'",
        "s.yaml:3: mode: expected 'a' today",
        "s.yaml:4: tags.x: expected a whole number, got 'y'",
    ]
    assert refused(tmp_path, "[1]") == ["s.yaml:1: expected a mapping, got [1]"]
    assert refused(tmp_path, "data: 1") == ["s.yaml:1: data: expected a mapping, got 1"]
    assert refused(tmp_path, "rate: -1\ndata: {train: x}") == [
        "s.yaml:1: rate: expected more than 0.0, got -1"
    ]
