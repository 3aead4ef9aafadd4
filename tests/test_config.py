"""Configuration is strict, and its errors help."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from hieratok.config import apply_overrides, build, load_recipe, recipe_names, to_dict
from hieratok.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"
    sides: list[int] | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int = 3
    inner: Inner = field(default_factory=Inner)


def test_a_mapping_becomes_nested_dataclasses_and_back():
    built = build(Outer, {"name": "x", "inner": {"rate": 1, "sides": [1, 2]}})
    assert built == Outer("x", 3, Inner(1.0, "a", [1, 2]))
    assert build(Outer, to_dict(built)) == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "stepz": 1}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"name": "x", "inner": {"rat": 1}}, "unknown key 'inner.rat'; did you mean 'rate'"),
        ({"name": "x", "steps": "many"}, "'steps' must be int, got 'many'"),
        ({"name": "x", "steps": 1.5}, "'steps' must be int"),
        ({"name": "x", "steps": True}, "'steps' must be int"),
        ({"name": "x", "inner": {"kind": "c"}}, "'inner.kind' is 'c'"),
        ({"name": "x", "inner": {"sides": [1, "b"]}}, r"'inner.sides\[1\]' must be int"),
        ({"name": "x", "inner": 3}, "inner must be a section"),
        ({}, "'name' is required"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values)


def test_1e_4_is_a_number_whatever_yaml_thinks():
    values = apply_overrides({"name": "x"}, ["inner.rate=1e-4", "steps=7", "inner.sides=[1, 2]", "inner.kind=b"])
    assert build(Outer, values) == Outer("x", 7, Inner(1e-4, "b", [1, 2]))


def test_an_override_without_a_value_is_refused():
    with pytest.raises(ConfigError, match="section.field=value"):
        apply_overrides({}, ["steps"])


def test_a_recipe_extends_another_and_shows_only_what_differs(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {preset: a, width: 1}\ntrain: {steps: 3, rate: 1}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nmodel: {preset: b}\ntrain: {steps: 4}\n")
    values = load_recipe(tmp_path / "mine.yaml")
    assert values["train"] == {"steps": 4, "rate": 1}
    assert values["model"] == {"preset": "b"}, "a new preset starts afresh"


def test_a_circle_of_recipes_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_recipe(tmp_path / "a.yaml")


def test_an_unknown_recipe_is_refused_with_the_nearest():
    assert "small-64" in recipe_names() and "_paper" not in recipe_names()
    with pytest.raises(ConfigError, match="did you mean 'small-64'"):
        load_recipe("smal-64")
