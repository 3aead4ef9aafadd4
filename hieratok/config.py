"""Configuration as data with types: frozen dataclasses, YAML recipes of what differs, `key=value` overrides.

Dataclasses live beside what reads them; this module only turns mappings into them, strictly. An unknown key, a value
of the wrong type or a recipe that does not exist is a `ConfigError` that names the nearest valid choice.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import ConfigError

T = TypeVar("T")

RECIPES = Path(__file__).parent / "configs"


def suggest(wrong: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest choice, and the list of choices where none is near."""
    choices = list(choices)
    near = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; valid: {', '.join(choices)}"


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """The mapping of a recipe: a name of `recipe_names()` or the path of a YAML file.

    A recipe that says `extends: OTHER` (a name, or a path relative to itself) is merged over that one, section by
    section.

    Raises:
        ConfigError: no such recipe, not a mapping, or a circle of `extends`.
    """
    return _load(str(name_or_path), folder=Path.cwd(), seen=())


def _load(name_or_path: str, folder: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(name_or_path, folder)
    if path in seen:
        raise ConfigError(f"{path} extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, where a mapping of sections is expected")
    base = values.pop("extends", None)
    if base is None:
        return values
    return merge(_load(str(base), path.parent, (*seen, path)), values)


def _find(name_or_path: str, folder: Path) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        path = (folder / name_or_path).resolve()
        if not path.is_file():
            raise ConfigError(f"no configuration file at {path}")
        return path
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ConfigError(f"no recipe named '{name_or_path}'{suggest(name_or_path, recipe_names())}")
    return path


def recipe_names() -> list[str]:
    """Names that `--config` takes, sorted; a leading underscore marks a base that is no run of its own."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("_"))


def recipe_kind(name_or_path: str | Path) -> str:
    """`"generator"` or `"tokenizer"`: what a recipe trains. That of a generator names a tokenizer."""
    return "generator" if "tokenizer" in load_recipe(name_or_path) else "tokenizer"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings merge key by key, everything else is replaced.

    A `preset` named in `over` starts its section afresh: fields of another preset would make no sense under it.
    """
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping) and "preset" not in value:
            merged[key] = merge(known, value)
        else:
            merged[key] = value
    return merged


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`["train.learning_rate=1e-4", "model.scales=[1,2,4]"]` applied; each value is read as YAML.

    Raises:
        ConfigError: an override without `=`, or one that reaches into something that is not a section.
    """
    result = merge(values, {})
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{override}' is not an override; write section.field=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of '{override}' is not valid YAML: {error}") from error
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A (nested) dataclass from a mapping, strictly.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), a missing required field or a wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} must be a section with fields, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    types_of = typing.get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ConfigError(f"unknown key '{name}'{suggest(str(key), fields)}")
        kwargs[str(key)] = convert(value, types_of[key], name)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in kwargs:
            raise ConfigError(f"'{f'{where}.{name}' if where else name}' is required")
    return cls(**kwargs)


def convert(value: Any, kind: Any, name: str) -> Any:
    """`value` as the annotated type, or a ConfigError that names the field."""
    if dataclasses.is_dataclass(kind):
        return build(kind, value, name)  # type: ignore[arg-type]
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(kind), name)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(f"'{name}' is {value!r}{suggest(str(value), map(str, choices))}")
        return value
    if origin in (list, tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"'{name}' must be a list, got {value!r}")
        item = typing.get_args(kind)[0] if typing.get_args(kind) else Any
        return (tuple if origin is tuple else list)(convert(v, item, f"{name}[{i}]") for i, v in enumerate(value))
    if kind is Any:
        return value
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"'{name}' must be a section with fields, got {value!r}")
        return dict(value)
    return _convert_scalar(value, kind, name)


def _convert_union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in (k for k in kinds if k is not type(None)):
        try:
            return convert(value, kind, name)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(errors[0] + (" (or null)" if type(None) in kinds else ""))


def _convert_scalar(value: Any, kind: Any, name: str) -> Any:
    # YAML 1.1 reads 1e-4 as a string (it wants 1.0e-4), which nobody means.
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif kind is int and not isinstance(value, bool):
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return int(value)
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind is str and isinstance(value, (str, Path)):
        return str(value)
    raise ConfigError(f"'{name}' must be {kind.__name__}, got {value!r}")


def to_dict(obj: Any) -> Any:
    """The plain mapping of a dataclass, JSON- and YAML-able (tuples become lists, paths become strings)."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_dict(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): to_dict(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [to_dict(value) for value in obj]
    return str(obj) if isinstance(obj, Path) else obj
