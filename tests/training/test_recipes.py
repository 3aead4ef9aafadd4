"""A run by the command line, begun from a recipe and gone on with from its own folder."""

from __future__ import annotations

import json

import pytest
import yaml

from hieratok.cli import main
from hieratok.engine.log import METRICS, read_metrics


@pytest.fixture
def recipe(make_values, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_values("train.steps=6", "train.ema_decay=0.9")))
    return path


def test_a_run_is_gone_on_with_by_its_folder_alone(recipe, tmp_path):
    output = tmp_path / "mine"
    arguments = ["--config", str(recipe), f"output={output}", "train.weight_decay=0.1"]
    assert main(["train", "tokenizer", *arguments]) == 0
    recipe.unlink()  # the run has its own copy, overrides included
    assert main(["train", "tokenizer", "--resume", f"output={output}", "train.steps=9"]) == 0
    lines = read_metrics(output / METRICS)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [6, 9]
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["train"]["weight_decay"] == 0.1 and config["train"]["steps"] == 9
    assert "psnr" in json.dumps(json.loads((output / "eval.json").read_text()))
    assert {line["step"] for line in lines if line["kind"] == "eval"} == {6, 9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "output={tmp}/nowhere"], "nothing to resume"),
        (["output={tmp}/nowhere"], "give a recipe"),
        (["--config", "{tmp}/recipe.yaml", "train.stepz=3"], "did you mean 'steps'"),
    ],
)
def test_what_cannot_be_begun_is_an_error_with_a_remedy_and_status_2(recipe, tmp_path, capsys, arguments, message):
    assert main(["train", "tokenizer", *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    assert message in capsys.readouterr().err
