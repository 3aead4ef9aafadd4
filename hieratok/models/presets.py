"""Named architectures: what `HieraTok(**PRESETS["f16d16"])` takes. Recipes in `hieratok/configs` refer to them.

`f16d16` reads: 16 pixels per latent side, 16 latent channels. Only what differs from HieraTok's defaults, which are
Table 10, is written. `DIT_PRESETS` are the generators.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from diffusers.configuration_utils import ConfigMixin

from ..config import convert, suggest
from ..errors import ConfigError
from .dit import DiT
from .tokenizer import HieraTok

M = TypeVar("M")

MULTI = [1, 2, 4, 8, 16]

# Small models for CPUs: the shape of the paper's, encoder smaller than decoder, at a fraction of its width. They
# see about a hundredth of the paper's steps, which is why the posterior starts quiet.
SMALL = {"encoder_num_layers": 3, "encoder_hidden_size": 256, "encoder_num_heads": 4,
         "decoder_num_layers": 6, "decoder_hidden_size": 256, "decoder_num_heads": 4,
         "decoder_drop_path_rate": 0.0, "initial_log_variance": -6.0}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # Table 2
    "f16d16": {"scales": MULTI, "latent_channels": 16},
    "f16d16-single": {"scales": [16], "latent_channels": 16},
    "f16d32": {"scales": MULTI, "latent_channels": 32},
    "f16d32-single": {"scales": [16], "latent_channels": 32},
    # Table 3: downsampler x attention pattern (conv + scale-causal is f16d16)
    "f16d16-conv-independent": {"scales": MULTI, "attention_pattern": "scale_independent"},
    "f16d16-conv-full": {"scales": MULTI, "attention_pattern": "full"},
    "f16d16-interpolation-causal": {"scales": MULTI, "downsampler": "interpolation"},
    "f16d16-interpolation-independent": {
        "scales": MULTI, "downsampler": "interpolation", "attention_pattern": "scale_independent",
    },
    "f16d16-interpolation-full": {"scales": MULTI, "downsampler": "interpolation", "attention_pattern": "full"},
    # Table 4: sets of scales ([1, 2, 4, 8, 16] is f16d16, [16] is f16d16-single)
    "f16d16-3coarse": {"scales": [1, 2, 4, 16]},
    "f16d16-6scales": {"scales": [1, 2, 4, 8, 12, 16]},
    # Small
    "small-64": {**SMALL, "image_size": 64, "patch_size": 8, "latent_channels": 16, "scales": [1, 2, 4, 8]},
    "small-64-single": {**SMALL, "image_size": 64, "patch_size": 8, "latent_channels": 16, "scales": [8]},
    "tiny-64": {
        **SMALL, "image_size": 64, "patch_size": 8, "latent_channels": 16, "scales": [1, 2, 4, 8],
        "encoder_num_layers": 2, "encoder_hidden_size": 192, "encoder_num_heads": 3,
        "decoder_num_layers": 4, "decoder_hidden_size": 192, "decoder_num_heads": 3,
    },
    "small-32": {**SMALL, "image_size": 32, "patch_size": 4, "latent_channels": 8, "scales": [1, 2, 4, 8]},
    "small-32-single": {**SMALL, "image_size": 32, "patch_size": 4, "latent_channels": 8, "scales": [8]},
}  # fmt: skip


# The generators of Table 6 (with the published widths), and small ones for CPUs.
DIT_PRESETS: dict[str, dict[str, Any]] = {
    "dit-xl": {"hidden_size": 1152, "num_layers": 28, "num_heads": 16},
    "dit-l": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "dit-b": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "dit-s": {"hidden_size": 384, "num_layers": 12, "num_heads": 6},
    "dit-small": {"hidden_size": 320, "num_layers": 8, "num_heads": 5},
    "dit-tiny": {"hidden_size": 256, "num_layers": 6, "num_heads": 4},
}


def model_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a tokenizer: `{"preset": NAME, **changes}`, checked against HieraTok's signature.

    Raises:
        ConfigError: an unknown preset or field (the nearest is named), or a value of the wrong type.
    """
    return _fields(values, HieraTok, PRESETS)


def dit_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a generator: `{"preset": NAME, **changes}`, checked against DiT's signature.

    Raises:
        ConfigError: an unknown preset or field (the nearest is named), or a value of the wrong type.
    """
    return _fields(values, DiT, DIT_PRESETS)


def _fields(values: Mapping[str, Any], model: type, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    changes = dict(values)
    name = changes.pop("preset", None)
    if name is not None and name not in presets:
        raise ConfigError(f"no model preset '{name}'{suggest(str(name), presets)}")
    parameters = inspect.signature(model.__init__).parameters  # type: ignore[misc]
    known = {key: p.default for key, p in parameters.items() if key != "self"}
    for key in changes:
        if key not in known:
            raise ConfigError(f"unknown key 'model.{key}'{suggest(key, ['preset', *known])}")
    types_of = typing.get_type_hints(model.__init__)  # type: ignore[misc]
    checked = {key: convert(value, types_of[key], f"model.{key}") for key, value in changes.items()}
    return {**known, **(presets[name] if name else {}), **checked}


def plain_config(model: ConfigMixin) -> dict[str, Any]:
    """The arguments of a model's constructor, without what diffusers adds to them."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def create_model(name: str, **changes: Any) -> HieraTok:
    """A freshly initialised model: `create_model("f16d16", latent_channels=8)`.

    Raises:
        ConfigError: an unknown preset or field, or numbers that do not fit together.
    """
    return build_model({"preset": name, **changes})


def build_model(values: Mapping[str, Any]) -> HieraTok:
    """A freshly initialised tokenizer from the `model` section of a recipe.

    Raises:
        ConfigError: an unknown preset or field, or numbers that do not fit together.
    """
    return _build(HieraTok, model_fields(values))


def build_dit(values: Mapping[str, Any]) -> DiT:
    """A freshly initialised generator from the `model` section of a recipe.

    Raises:
        ConfigError: an unknown preset or field, or numbers that do not fit together.
    """
    return _build(DiT, dit_fields(values))


def _build(model: Callable[..., M], fields: Mapping[str, Any]) -> M:
    try:
        return model(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error
