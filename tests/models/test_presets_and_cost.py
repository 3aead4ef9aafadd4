"""The named models are the paper's, by count."""

import pytest
import torch

from hieratok.config import load_recipe, recipe_kind, recipe_names
from hieratok.errors import ConfigError
from hieratok.models.cost import cost, cost_table
from hieratok.models.presets import PRESETS, build_model, create_model, model_fields


@pytest.mark.parametrize(
    ("preset", "millions", "encoder_tokens", "decoder_tokens"),
    [("f16d16-single", 346.25, 256, 256), ("f16d16", 401.18, 256, 341)],
)
def test_the_papers_models_have_the_papers_parameters_and_tokens(preset, millions, encoder_tokens, decoder_tokens):
    counted = cost(preset)
    assert counted.parameters / 1e6 == pytest.approx(millions, rel=1e-3)  # Table 7
    assert (counted.encoder_tokens, counted.decoder_tokens) == (encoder_tokens, decoder_tokens)


def test_operations_are_counted_as_two_per_multiplication(tiny_fields):
    fields = {**tiny_fields, "scales": [4], "decoder_num_layers": 1}
    tokens, width, patch = 16, 32, 3 * 8 * 8
    block = 2 * tokens * (12 * width * width) + 2 * 2 * tokens * tokens * width
    counted = cost(fields)
    assert counted.encoder_flops == block + 2 * tokens * (patch * width + width * 8)
    assert counted.decoder_flops == block + 2 * tokens * (4 * width + width * patch)


def test_the_cost_table_stands_beside_table_7():
    table = cost_table({"f16d16": "f16d16"})
    assert "401.11M" in table and "401.18M" in table and "230.45" in table and "341" in table


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds(preset):
    with torch.device("meta"):
        assert create_model(preset).config.scales == PRESETS[preset]["scales"]


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if recipe_kind(name) == "tokenizer"])
def test_every_recipe_names_a_model_that_builds_or_begins_from_another_run(recipe):
    values = load_recipe(recipe)
    if values["model"] is None:
        assert "init_from" in values
        return
    with torch.device("meta"):
        build_model(values["model"])


def test_a_change_is_laid_over_the_preset():
    fields = model_fields({"preset": "f16d32", "latent_channels": 8})
    assert fields["latent_channels"] == 8 and fields["decoder_num_layers"] == 24


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'f16d16'"):
        model_fields({"preset": "f16d61"})
    with pytest.raises(ConfigError, match="did you mean 'latent_channels'"):
        model_fields({"latent_chanels": 8})
    with pytest.raises(ConfigError, match="must end in the side"):
        create_model("small-64", scales=[1, 2, 5])
