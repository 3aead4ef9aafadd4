"""The dry run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hieratok.cli import main
from hieratok.data.loader import train_loader
from hieratok.errors import ConfigError, DataError
from hieratok.training import plan as plan_module
from hieratok.training.plan import Plan, duration, part, plan


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_it_says_what_would_be_done_and_writes_nothing(make_values, tmp_path, image_folder, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_values()))
    before = files(tmp_path)
    assert main(["train", "tokenizer", "--config", str(recipe), "--dry-run", "train.steps=1000"]) == 0
    assert files(tmp_path) == before
    text = capsys.readouterr().out
    resolved = yaml.safe_load(text.split("\n\n")[0])
    assert resolved["train"]["steps"] == 1000 and resolved["train"]["batch_size"] == 8  # the override and the recipe
    assert resolved["train"]["weight_decay"] == 0.05  # a default
    for words in ("18 training and 6 validation images", "s per step of 8 images", "about 1,000 steps",
                  "CPU with 1 thread", "parameters", f"{tmp_path / 'run'} (nothing was written)"):  # fmt: skip
        assert words in text, words


def test_it_times_a_whole_step_of_the_whole_batch(make_run):
    found = plan(make_run("train.accumulation=2"))
    assert (found.num_train, found.num_val, found.total_steps) == (18, 6, 40)
    assert found.timed_images == 8
    assert 0.001 < found.seconds_per_step < 10


def test_a_batch_that_takes_too_long_is_timed_on_a_part_of_it(make_run, monkeypatch):
    monkeypatch.setattr(plan_module, "PATIENCE", 1e-9)
    found = plan(make_run())
    assert found.timed_images == 2
    assert "timed on 2 images" in found.describe()


def make_plan(make_run, *overrides: str, seconds: float) -> Plan:
    run = make_run(*overrides)
    return Plan(run, "cpu", 18, 6, run.train.total_steps(18), seconds, 8)


def test_the_length_is_that_of_the_steps_or_of_the_clock_whichever_ends_first(make_run):
    assert make_plan(make_run, "train.steps=120", seconds=0.5).minutes == 1
    assert make_plan(make_run, "train.steps=120", "train.max_minutes=3", seconds=0.5).minutes == 1
    by_clock = make_plan(make_run, "train.steps=1200", "train.max_minutes=3", seconds=0.5)
    assert by_clock.minutes == 3
    assert "about 360 steps (160.00 epochs), 3 min" in by_clock.describe()


@pytest.mark.parametrize("seconds", [0.00012, 0.02987, 0.05969, 0.5])  # 4 * 0.02987 / 60 * 60 / 0.02987 is below 4
def test_every_step_is_counted_however_long_one_takes(make_run, seconds):
    assert make_plan(make_run, "train.steps=4", seconds=seconds).steps == 4


@pytest.mark.parametrize(
    ("minutes", "words"),
    [(0.5, "30 s"), (1.4, "84 s"), (4.2, "4 min"), (89, "89 min"), (125, "2 h 05 min"), (60 * 60, "2.5 days")],
)
def test_a_duration_is_told_in_the_unit_that_suits_it(minutes, words):
    assert duration(minutes) == words


def test_a_part_of_a_batch_has_all_its_fields(make_run):
    run = make_run()
    batch = next(iter(train_loader(run.data.open("train"), run.data.frame(32), seed=0, batch_size=8)))
    cut = part(batch, 3)
    assert len(cut.images) == len(cut.labels) == len(cut.indices) == len(cut.keys) == len(cut.seeds) == 3
    assert cut.keys == batch.keys[:3]


@pytest.mark.parametrize(
    ("override", "error"),
    [("train.batch_size=7", ConfigError), ("data.source=/nowhere", DataError), ("loss.scale_weights=[1]", ConfigError)],
)
def test_what_the_run_would_refuse_the_dry_run_refuses(make_run, override, error):
    with pytest.raises(error):
        plan(make_run(override, "train.accumulation=2"))
