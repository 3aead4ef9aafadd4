"""The folder of a run: begun once, gone on with as it was, and a model read from whatever of it is there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hieratok.engine import checkpoint
from hieratok.engine.run_folder import load_tokenizer, start
from hieratok.errors import CheckpointError, ConfigError
from hieratok.models.tokenizer import HieraTok

CONFIG: dict[str, Any] = {
    "model": {"preset": "small-32"},
    "seed": 0,
    "output": "run",
    "data": {"source": "photos", "augment": True, "num_workers": 1, "max_val_images": None},
    "loss": {"l1": 1.0},
    "train": {"steps": 100, "batch_size": 8, "accumulation": 1, "learning_rate": 1e-3, "precision": "fp32",
              "log_every": 50},
    "eval": {"every": 0},
}  # fmt: skip
FACTS: dict[str, Any] = {"seed": 0, "world_size": 1, "data": {"name": "photos", "digest": "abc", "num_train": 90}}


def changed(key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *sections, last = key.split(".")
    place = config
    for section in sections:
        place = place[section]
    place[last] = value
    return config


def test_a_run_is_recorded_before_it_begins(tmp_path):
    start(tmp_path / "a" / "run", CONFIG, FACTS, resume=False)
    record = json.loads((tmp_path / "a" / "run" / "run.json").read_text())
    assert record["config"] == CONFIG and record["data"] == FACTS["data"] and record["world_size"] == 1
    assert {"python", "torch", "hieratok", "diffusers"} <= record["versions"].keys()
    assert yaml.safe_load((tmp_path / "a" / "run" / "config.yaml").read_text()) == CONFIG


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_is_untouched(tmp_path):
    start(tmp_path, CONFIG, FACTS, resume=False)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run; .*--resume"):
        start(tmp_path, changed("seed", 1), FACTS, resume=False)
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_run_can_be_resumed_before_there_is_one(tmp_path):
    start(tmp_path, CONFIG, FACTS, resume=True)
    assert (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        ("model", {"preset": "small-64"}, "'small-32'"), ("seed", 1, "0"), ("train.batch_size", 16, "8"),
        ("train.accumulation", 2, "1"),
        ("train.optimizer", "muon", "None"), ("data.source", "others", "'photos'"),
        ("data.augment", False, "True"), ("loss.l1", 2.0, "1.0"),
    ],
)  # fmt: skip
def test_what_makes_it_another_run_is_refused_with_both_values(tmp_path, key, value, before):
    start(tmp_path, CONFIG, FACTS, resume=False)
    record = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, changed(key, value), FACTS, resume=True)
    shown = value["preset"] if isinstance(value, dict) else value
    assert f"{key}" in str(caught.value) and f": {before} before, {shown!r} now" in str(caught.value)
    assert (tmp_path / "run.json").read_bytes() == record


def test_every_change_is_listed(tmp_path):
    start(tmp_path, CONFIG, FACTS, resume=False)
    config = changed("seed", 1)
    config["train"]["batch_size"] = 16
    with pytest.raises(ConfigError, match=r"seed: 0 before, 1 now\n +train.batch_size: 8 before, 16 now"):
        start(tmp_path, config, FACTS, resume=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 200), ("train.learning_rate", 1e-4), ("train.log_every", 5), ("data.num_workers", 4),
        ("eval.every", 10), ("output", "moved"), ("data.max_val_images", 10),
    ],
)  # fmt: skip
def test_what_does_not_make_it_another_run_may_change_and_is_recorded(tmp_path, key, value):
    start(tmp_path, CONFIG, FACTS, resume=False)
    start(tmp_path, changed(key, value), FACTS, resume=True)
    assert json.loads((tmp_path / "run.json").read_text())["config"] == changed(key, value)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == changed(key, value)


def test_other_images_under_the_same_name_are_refused(tmp_path):
    start(tmp_path, CONFIG, FACTS, resume=False)
    facts = {**FACTS, "data": {"name": "photos", "digest": "abd", "num_train": 91}}
    with pytest.raises(ConfigError, match="the images of photos: 90 before, 91 now"):
        start(tmp_path, CONFIG, facts, resume=True)


# Reading a model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def write_checkpoint(folder: Path, model: HieraTok, step: int, ema: dict[str, torch.Tensor] | None = None) -> Path:
    tensors = {"model": model.state_dict(), **({"ema": ema} if ema is not None else {})}
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return checkpoint.save(folder / "checkpoints", step, tensors, {"step": step, "model": config}, keep=2)


def assert_same(found: HieraTok, model: HieraTok, images: torch.Tensor) -> None:
    assert not found.training
    with torch.no_grad():
        assert torch.equal(found.encode(images).latent_dist.mode(), model.encode(images).latent_dist.mode())


def test_a_saved_model_is_read_from_its_folder_and_from_its_runs(tmp_path, tiny_model, images):
    tiny_model.save_pretrained(tmp_path / "run" / "model")
    assert_same(load_tokenizer(tmp_path / "run" / "model"), tiny_model, images)
    assert_same(load_tokenizer(str(tmp_path / "run")), tiny_model, images)


def test_of_an_unfinished_run_it_is_the_average_of_the_newest_checkpoint(tmp_path, tiny_model, tiny_fields, images):
    average = HieraTok(**tiny_fields)
    write_checkpoint(tmp_path, tiny_model, 10)
    path = write_checkpoint(tmp_path, tiny_model, 20, ema=dict(average.named_parameters()))
    assert_same(load_tokenizer(tmp_path), average.eval(), images)
    assert_same(load_tokenizer(path), average.eval(), images)
    (path / "ema.safetensors").unlink()
    assert_same(load_tokenizer(tmp_path), tiny_model, images)  # of step 10, which has no average


def test_a_damaged_checkpoint_asked_for_by_name_is_not_replaced_by_another(tmp_path, tiny_model):
    write_checkpoint(tmp_path, tiny_model, 10)
    path = write_checkpoint(tmp_path, tiny_model, 20)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_where_there_is_no_model_the_error_says_what_was_expected(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("length", [0, 4, 300])
def test_a_saved_model_that_was_cut_off_is_a_checkpoint_error(tmp_path, tiny_model, name, length):
    tiny_model.save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_saved_model_without_its_weights_is_a_checkpoint_error(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("change", [{"colour": 1}, {"latent_channels": 8}, {"scales": [1, 2]}, {"patch_size": 5}])
def test_a_checkpoint_of_something_else_is_a_checkpoint_error(tmp_path, tiny_model, tiny_fields, change):
    state = {"step": 1, "model": {**tiny_fields, **change}}
    path = checkpoint.save(tmp_path, 1, {"model": tiny_model.state_dict()}, state, keep=2)
    with pytest.raises(CheckpointError, match="does not hold a tokenizer"):
        load_tokenizer(path)
