"""Training the tokenizer: what it learns, what it leaves behind, and what it does with faults."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hieratok import HieraTok, load_tokenizer
from hieratok.data.loader import eval_loader
from hieratok.engine import checkpoint
from hieratok.engine.guards import Stopped
from hieratok.engine.log import METRICS, read_metrics
from hieratok.engine.loop import Engine
from hieratok.engine.optimizers import make_optimizers
from hieratok.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from hieratok.losses import TokenizerLoss
from hieratok.training import tokenizer
from hieratok.training.tokenizer import train_tokenizer


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / METRICS) if line["kind"] == "train"]


def at_step(monkeypatch, step: int, act: Callable[[Engine], None]) -> None:
    """Do something to the engine right after the optimizer's step of that number."""
    own = Engine.optimizer_step

    def patched(engine: Engine, grad_norm: torch.Tensor) -> None:
        own(engine, grad_norm)
        if engine.step == step:
            act(engine)

    monkeypatch.setattr(Engine, "optimizer_step", patched)


def stop_at(monkeypatch, step: int) -> None:
    """As if SIGTERM came during that step."""
    at_step(monkeypatch, step, lambda engine: setattr(engine.signals, "received", int(signal.SIGTERM)))


def newest(folder: Path) -> checkpoint.Checkpoint:
    found, _ = checkpoint.newest_valid(folder / "checkpoints")
    assert found is not None
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return newest(folder).tensors["model"]


# Going on


def test_a_run_that_was_stopped_and_gone_on_with_equals_one_that_was_not(make_run, monkeypatch, assert_same_runs):
    settings = ("train.accumulation=2", "data.num_workers=2", "train.ema_decay=0.99", "loss.lpips=1.0")
    clean = train_tokenizer(make_run(*settings, output="clean"))
    stopped = make_run(*settings, output="stopped")
    for step in (7, 20, 33):  # no multiple of log_every (6), checkpoint_every (15) or the 2 2/8 steps of an epoch
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped) as caught:
                train_tokenizer(stopped, resume=step > 7)
        assert caught.value.code == 128 + signal.SIGTERM
        assert checkpoint.all_steps(Path(stopped.output) / "checkpoints")[-1] == step
    train_tokenizer(stopped, resume=True)
    assert_same_runs(clean, stopped.output)
    assert [line["step"] for line in read_metrics(clean / METRICS)] == [6, 12, 18, 24, 30, 36, 40]


def test_a_run_with_muon_goes_on_bit_for_bit_too(make_run, monkeypatch, assert_same_runs):
    settings = ("train.optimizer=muon", "train.steps=9")
    clean = train_tokenizer(make_run(*settings, output="clean"))
    stopped = make_run(*settings, output="stopped")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        train_tokenizer(stopped)
    train_tokenizer(stopped, resume=True)
    assert_same_runs(clean, stopped.output)
    slots = {name.rpartition(":")[2] for name in newest(clean).tensors["optimizer"]}
    assert slots == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}


def test_the_result_does_not_depend_on_the_number_of_workers(make_run, assert_same_runs):
    runs = [make_run("train.steps=12", f"data.num_workers={n}", output=f"run{n}") for n in (0, 2)]
    assert_same_runs(*map(train_tokenizer, runs))


def test_another_seed_is_another_run(make_run):
    first, second = (train_tokenizer(make_run("train.steps=6", f"seed={s}", output=f"run{s}")) for s in (0, 1))
    assert losses(first) != losses(second)


def test_accumulation_changes_the_loss_by_rounding_only(make_run):
    at_once = losses(train_tokenizer(make_run("train.log_every=1", "train.steps=12", output="one")))
    settings = ("train.log_every=1", "train.steps=12", "train.accumulation=2")
    in_parts = losses(train_tokenizer(make_run(*settings, output="two")))
    assert len(at_once) == 12
    assert in_parts == pytest.approx(at_once, rel=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(make_run):
    plain = losses(train_tokenizer(make_run("train.log_every=1", "train.steps=6", output="plain")))
    settings = ("train.log_every=1", "train.steps=6", "train.gradient_checkpointing=true")
    recomputed = losses(train_tokenizer(make_run(*settings, output="recomputed")))
    assert recomputed == pytest.approx(plain, rel=1e-6)


def test_a_finished_run_can_be_made_longer(make_run):
    run = make_run("train.steps=6")
    train_tokenizer(run)
    folder = train_tokenizer(replace(run, train=replace(run.train, steps=12, learning_rate=1e-3)), resume=True)
    assert [line["step"] for line in read_metrics(folder / METRICS)] == [6, 12]
    assert json.loads((folder / "run.json").read_text())["config"]["train"]["steps"] == 12


def test_a_run_gone_on_with_when_it_is_finished_stays_as_it_is(make_run, assert_same_runs):
    run = make_run("train.steps=6", "eval.every=3")
    folder = train_tokenizer(run, evaluator=Judge())
    before, lines = (folder / "model" / "config.json").read_text(), read_metrics(folder / METRICS)
    train_tokenizer(run, resume=True, evaluator=Judge())
    assert (folder / "model" / "config.json").read_text() == before
    assert [(x["kind"], x["step"]) for x in read_metrics(folder / METRICS)] == [(x["kind"], x["step"]) for x in lines]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(make_run, assert_same_runs, capsys):
    run = make_run("train.steps=20", "train.checkpoint_every=8", output="damaged")
    clean = train_tokenizer(replace(run, output=run.output + "-clean"))
    folder = train_tokenizer(run)
    (folder / "checkpoints" / "step-00000020" / "ema.safetensors").write_bytes(b"")
    train_tokenizer(run, resume=True)
    assert "damaged checkpoint left out" in capsys.readouterr().err
    assert_same_runs(clean, folder)


def test_when_all_checkpoints_are_damaged_the_run_does_not_begin_anew(make_run):
    run = make_run("train.steps=6", "train.checkpoint_every=3")
    folder = train_tokenizer(run)
    for path in (folder / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        train_tokenizer(run, resume=True)


def test_a_list_of_bad_images_that_was_cut_off_by_a_crash_does_not_prevent_going_on(make_run, image_folder):
    spoil(image_folder, 1)
    run = make_run("train.steps=6", "data.max_bad_fraction=0.2")
    folder = train_tokenizer(run)
    path = folder / "bad_images.jsonl"
    path.write_text(path.read_text() + '{"index": 3, "ke')
    train_tokenizer(replace(run, train=replace(run.train, steps=9)), resume=True)
    assert [line["step"] for line in read_metrics(folder / METRICS)] == [6, 9]


# Learning


def test_the_loss_falls_on_a_small_set(make_run):
    settings = ("train.steps=60", "train.log_every=10", "train.learning_rate=5e-3", "data.augment=false")
    found = losses(train_tokenizer(make_run(*settings)))
    assert found[-1] < 0.8 * found[0]
    assert found == sorted(found, reverse=True)


def test_bf16_learns_nearly_the_same(make_run):
    full = losses(train_tokenizer(make_run("train.steps=12", output="fp32")))
    half = losses(train_tokenizer(make_run("train.steps=12", "train.precision=bf16", output="bf16")))
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


def test_the_learning_rate_warms_up_and_anneals(make_run):
    run = make_run("train.steps=20", "train.log_every=1", "train.warmup_ratio=0.2", "train.final_learning_rate=1e-5")
    rates = [line["learning_rate"] for line in read_metrics(train_tokenizer(run) / METRICS)]
    assert rates[:4] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5)


def test_the_clock_ends_the_run_and_anneals_the_learning_rate(make_run, monkeypatch):
    seconds = iter(range(10_000))
    monkeypatch.setattr("hieratok.engine.loop.time.monotonic", lambda: float(next(seconds)))
    run = make_run("train.steps=100000", "train.max_minutes=0.5", "train.log_every=1", "train.warmup_ratio=0.1")
    lines = read_metrics(train_tokenizer(run) / METRICS)
    assert 25 <= len(lines) <= 30  # a step takes one second of this clock
    rates = [line["learning_rate"] for line in lines]
    assert max(rates) > 1.9e-3 and rates[-1] < 4e-5
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_matrices_decay_and_vectors_and_embeddings_do_not(tiny_model, make_run):
    names = {parameter: name for name, parameter in tiny_model.named_parameters()}
    (optimizer,) = make_optimizers(tiny_model, make_run("train.weight_decay=0.05").train)
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(names.values())
    for name, parameter in tiny_model.named_parameters():
        free = parameter.ndim < 2 or name.endswith(("position", "scale_embedding"))
        assert decays[name] == (0.0 if free else 0.05), name
    assert any(name.endswith("scale_embedding") for name in decays)


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_twice(tiny_model, make_run):
    names = {parameter: name for name, parameter in tiny_model.named_parameters()}
    adamw, muon = make_optimizers(tiny_model, make_run("train.optimizer=muon").train)
    owned = [[names[p] for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert sorted(owned[0] + owned[1]) == sorted(names.values())
    assert owned[1] and all(".blocks." in name and name.endswith("weight") for name in owned[1])


# What is left behind


@dataclass
class Judge:
    """An evaluator that remembers the weights it was shown."""

    shown: list[tuple[dict[str, torch.Tensor], int]] = field(default_factory=list)

    def __call__(self, model: HieraTok, images: Any, run: Any, accelerator: Any) -> Found:
        self.shown.append(({n: p.detach().clone() for n, p in model.named_parameters()}, len(images)))
        torch.rand(3)  # an evaluation may use the global generator
        return Found({"psnr": float(len(self.shown))})


@dataclass
class Found:
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics}


def test_the_model_is_the_average_with_the_statistics_of_the_latents(make_run, tiny_fields):
    folder = train_tokenizer(make_run("train.steps=12"))
    model, ema = HieraTok.from_pretrained(folder / "model"), newest(folder).tensors["ema"]
    loaded = load_tokenizer(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ema[name]), name
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert any(not torch.equal(parameter, weights(folder)[name]) for name, parameter in model.named_parameters())
    channels = tiny_fields["latent_channels"]
    assert len(model.config.latents_mean) == len(model.config.latents_std) == channels
    assert all(std > 0 and math.isfinite(std) for std in model.config.latents_std)
    assert model.config.scaling_factor != 1.0


def test_the_statistics_make_the_training_latents_standard(make_run):
    run = make_run("train.steps=12")
    model = load_tokenizer(train_tokenizer(run))
    images = torch.cat([batch.images for batch in eval_loader(run.data.open("train"), 32, 64)])
    with torch.no_grad():
        posterior = model.encode(images.float() / 127.5 - 1).latent_dist
        torch.manual_seed(0)
        drawn = torch.cat([posterior.sample() for _ in range(8)])
    normal = model.normalize_latents(drawn)
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 0.15
    assert normal.std(dim=(0, 2, 3)) == pytest.approx(torch.ones(4), rel=0.1)
    assert (drawn * model.config.scaling_factor).std().item() == pytest.approx(1.0, rel=0.1)


def test_without_an_average_the_model_is_the_weights(make_run):
    folder = train_tokenizer(make_run("train.steps=6", "train.ema_decay=0"))
    model = load_tokenizer(folder)
    assert all(torch.equal(parameter, weights(folder)[name]) for name, parameter in model.named_parameters())
    assert not list(folder.glob("checkpoints/*/ema.safetensors"))


def test_the_evaluator_is_shown_the_average_at_intervals_and_at_the_end(make_run):
    judge = Judge()
    run = make_run("train.steps=12", "eval.every=5", "train.checkpoint_every=5", "train.keep_checkpoints=3")
    folder = train_tokenizer(run, evaluator=judge)
    evaluated = [line for line in read_metrics(folder / METRICS) if line["kind"] == "eval"]
    assert [(line["step"], line["psnr"], line["samples_seen"]) for line in evaluated] == [
        (5, 1.0, 40), (10, 2.0, 80), (12, 3.0, 96)
    ]  # fmt: skip
    assert json.loads((folder / "eval.json").read_text()) == {"metrics": {"psnr": 3.0}}
    for step, (shown, count) in zip((5, 10, 12), judge.shown, strict=True):
        ema = checkpoint.load(folder / "checkpoints" / f"step-{step:08d}").tensors["ema"]
        assert all(torch.equal(tensor, ema[name]) for name, tensor in shown.items())
        assert count == len(run.data.open("val"))


def test_evaluating_does_not_change_the_training(make_run):
    plain = train_tokenizer(make_run("train.steps=12", output="plain"))
    judged = train_tokenizer(make_run("train.steps=12", "eval.every=2", output="judged"), evaluator=Judge())
    assert losses(plain) == losses(judged)
    assert all(torch.equal(tensor, weights(judged)[name]) for name, tensor in weights(plain).items())


def test_an_evaluation_and_a_picture_that_a_stop_cut_off_are_made_when_the_run_goes_on(make_run, monkeypatch):
    run = make_run("train.steps=12", "eval.every=6", "train.picture_every=6")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 6)
        train_tokenizer(run, evaluator=Judge())
    folder = train_tokenizer(run, resume=True, evaluator=Judge())
    lines = [(line["kind"], line["step"]) for line in read_metrics(folder / METRICS)]
    assert lines == [("train", 6), ("eval", 6), ("train", 12), ("eval", 12)]
    assert [path.name for path in sorted((folder / "pictures").iterdir())] == ["step-00000006.png", "step-00000012.png"]


def test_pictures_show_held_out_images_at_every_scale(make_run):
    run = make_run("train.steps=6", "train.picture_every=3")
    folder = train_tokenizer(run)
    with Image.open(folder / "pictures" / "step-00000003.png") as image:
        rows = min(len(run.data.open("val")), tokenizer.PICTURED)
        assert image.size == (5 * (96 + 6) - 6, 18 + rows * (96 + 6) - 6)


def test_a_line_of_metrics_has_every_term_and_the_state_of_the_run(make_run):
    line = read_metrics(train_tokenizer(make_run("train.steps=6", "loss.lpips=1.0")) / METRICS)[0]
    terms = {"loss", "l1", "mse", "lpips", "kl", "l1/1", "l1/2", "l1/4", "mse/4", "lpips/4", "grad_norm"}
    assert terms | {"kind", "step", "samples_seen", "elapsed", "learning_rate", "images_per_second"} <= line.keys()
    assert (line["step"], line["samples_seen"], line["bad_images"]) == (6, 48, 0)
    assert line["loss"] == pytest.approx(line["l1"] + 0.4 * line["mse"] + line["lpips"] + 1e-6 * line["kl"], rel=1e-5)
    assert line["l1"] == pytest.approx(line["l1/1"] + line["l1/2"] + line["l1/4"], rel=1e-5)


# Refused before anything is written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precision=fp16", "fp16 needs a GPU"),
        ("train.accumulation=3", "train.batch_size 8 is not divisible by train.accumulation 3"),
        ("loss.scale_weights=[1, 1]", "loss.scale_weights has 2 numbers"),
        ("model.scales=[1, 3]", "scales"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_is_written(make_run, override, message):
    if torch.accelerator.is_available() and "fp16" in override:
        pytest.skip("fp16 is for GPUs, and here is one")
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(make_run(override, output="refused"))
    assert not Path(make_run(output="refused").output).exists()


def test_a_folder_without_images_is_refused_before_anything_is_written(make_run, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing"):
        train_tokenizer(make_run(f"data.source={tmp_path / 'nothing'}", output="refused"))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("override", ["seed=1", "train.batch_size=4", "model.latent_channels=8", "data.flip=true"])
def test_another_run_in_the_place_of_this_one_is_refused_with_what_differs(make_run, override):
    folder = train_tokenizer(make_run("train.steps=2"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        train_tokenizer(make_run("train.steps=4", override), resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_images_that_were_added_since_are_noticed(make_run, image_folder):
    run = make_run("train.steps=2")
    train_tokenizer(run)
    for i in range(4):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(image_folder / "a" / f"new{i}.png")
    with pytest.raises(ConfigError, match="the images of"):
        train_tokenizer(run, resume=True)


# Numbers that are not finite


def make_loss_nan_at(monkeypatch, step: int) -> None:
    """The criterion returns NaN in that step; its gradient stays finite."""
    own, calls = TokenizerLoss.forward, iter(range(1, 1000))

    def patched(self: TokenizerLoss, output: Any, images: torch.Tensor) -> Any:
        found = own(self, output, images)
        return found._replace(total=found.total + math.nan) if next(calls) == step else found

    monkeypatch.setattr(TokenizerLoss, "forward", patched)


def make_gradient_nan_at(monkeypatch, step: int) -> None:
    """The loss is finite, its gradient is not: the derivative of the root at 0, times 0."""
    own, calls = TokenizerLoss.forward, iter(range(1, 1000))

    def patched(self: TokenizerLoss, output: Any, images: torch.Tensor) -> Any:
        found = own(self, output, images)
        if next(calls) != step:
            return found
        zero = (output.scales[-1] - output.scales[-1].detach()).sum()
        return found._replace(total=found.total + zero.square().sqrt())

    monkeypatch.setattr(TokenizerLoss, "forward", patched)


@pytest.mark.parametrize("fault", [make_loss_nan_at, make_gradient_nan_at])
def test_a_step_with_nan_is_not_taken_and_its_samples_are_named(make_run, monkeypatch, assert_same_runs, fault):
    settings = ("train.steps=12", "train.checkpoint_every=5")
    clean = train_tokenizer(make_run(*settings, output="clean"))
    run = make_run(*settings)
    folder = Path(run.output)
    seen: list[list[str]] = []
    own = Engine.backward

    def listen(engine: Engine, loss: torch.Tensor, terms: Any, batch: Any) -> None:
        seen.append(batch.keys)
        own(engine, loss, terms, batch)

    with monkeypatch.context() as patch:
        fault(patch, 8)
        patch.setattr(Engine, "backward", listen)
        with pytest.raises(NonFiniteError, match=r"step 8: .*nan.*--resume"):
            train_tokenizer(run)
    record = json.loads((folder / "nonfinite.json").read_text())
    assert record["step"] == 8 and record["samples"] == seen[7] and len(seen[7]) == 8
    assert ("nan" in record["loss"]) == (fault is make_loss_nan_at)
    assert checkpoint.all_steps(folder / "checkpoints") == [5]
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())
    train_tokenizer(run, resume=True)  # the fault was a passing one
    assert_same_runs(clean, folder)


def test_nan_in_one_micro_batch_of_several_stops_the_step(make_run, monkeypatch):
    make_loss_nan_at(monkeypatch, 5)  # the first of the third step's two
    with pytest.raises(NonFiniteError, match="step 3"):
        train_tokenizer(make_run("train.accumulation=2"))


@pytest.mark.parametrize(("step", "kept"), [(7, [5]), (10, [5])])
def test_weights_that_went_bad_by_themselves_are_never_checkpointed(make_run, monkeypatch, step, kept):
    def poison(engine: Engine) -> None:
        next(engine.model.parameters()).data.view(-1)[0] = math.inf

    run = make_run("train.steps=12", "train.checkpoint_every=5")
    with monkeypatch.context() as patch:
        at_step(patch, step, poison)
        with pytest.raises(NonFiniteError):
            train_tokenizer(run)
    assert checkpoint.all_steps(Path(run.output) / "checkpoints") == kept
    train_tokenizer(run, resume=True)


def test_a_disk_that_is_full_stops_the_run_and_keeps_what_there_was(make_run, monkeypatch):
    run = make_run("train.steps=12", "train.checkpoint_every=5")
    own = checkpoint.write_durably

    def full(path: Path, data: bytes) -> None:
        if "step-00000010" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        own(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_durably", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            train_tokenizer(run)
    assert checkpoint.all_steps(Path(run.output) / "checkpoints") == [5]
    train_tokenizer(run, resume=True)


# Bad images


def spoil(folder: Path, count: int) -> set[str]:
    """Make the first images of a folder unreadable; their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())[:count]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    return {path.name for path in paths}


def test_bad_images_are_replaced_and_listed(make_run, image_folder, capsys):
    names = spoil(image_folder, 3)
    run = make_run("train.steps=12", "data.max_bad_fraction=0.2", "data.num_workers=2")
    folder = train_tokenizer(run)
    listed = [json.loads(line) for line in (folder / "bad_images.jsonl").read_text().splitlines()]
    train = {run.data.open("train").key(i) for i in range(len(run.data.open("train")))}
    assert {Path(entry["key"]).name for entry in listed} == {n for n in names if any(k.endswith(n) for k in train)}
    assert all(entry["reason"] for entry in listed) and len(listed) >= 2
    assert read_metrics(folder / METRICS)[-1]["bad_images"] == len(listed)
    assert capsys.readouterr().err.count("bad image replaced") == len(listed)


def test_with_bad_images_a_run_goes_on_bit_for_bit(make_run, image_folder, monkeypatch, assert_same_runs):
    spoil(image_folder, 3)
    settings = ("train.steps=8", "data.max_bad_fraction=0.2")
    clean = train_tokenizer(make_run(*settings, output="clean"))
    run = make_run(*settings)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        train_tokenizer(run)
    train_tokenizer(run, resume=True)
    assert_same_runs(clean, run.output)


def test_too_many_bad_images_stop_the_run(make_run, image_folder):
    spoil(image_folder, 6)
    with pytest.raises(DataError, match=r"images are bad, more than data.max_bad_fraction = 0.1"):
        train_tokenizer(make_run("data.max_bad_fraction=0.1"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_one_usable_image_stops_the_run_with_a_reason(make_run, image_folder, workers):
    spoil(image_folder, 24)
    with pytest.raises(DataError, match=r"not one image of a whole batch could be used.*[abc]/\d\d.*: .*runcated"):
        train_tokenizer(make_run(f"data.num_workers={workers}"))
