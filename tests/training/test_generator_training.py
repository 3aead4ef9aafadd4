"""Training a generator: what it learns, from which latents, what it leaves behind, and what it does with faults."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from hieratok import TOOLS, HieraTokPipeline, load_pipeline
from hieratok.config import apply_overrides, load_recipe, recipe_kind, recipe_names
from hieratok.data.latents import encode
from hieratok.data.opening import open_source
from hieratok.engine import checkpoint
from hieratok.engine.guards import Stopped
from hieratok.engine.log import METRICS, read_metrics
from hieratok.engine.loop import Engine
from hieratok.engine.optimizers import make_optimizers
from hieratok.errors import CheckpointError, ConfigError, NonFiniteError
from hieratok.losses.diffusion import DDPMLoss, FlowLoss
from hieratok.models.autoencoder import Autoencoder
from hieratok.models.dit import DiT
from hieratok.models.presets import build_dit, dit_fields
from hieratok.training.generator import GeneratorRun, Tools, train_generator
from hieratok.training.tokenizer import train_tokenizer

TOOLS_TO_SEE = Tools(paint=TOOLS.paint, export=TOOLS.export)  # all but an evaluation


@pytest.fixture
def saved_tokenizer(tiny_model, tmp_path) -> Path:
    """The tiny tokenizer, with latents that are far from standard: around 2, with a deviation of 0.2 or more."""
    tiny_model.encoder.moments.bias.data += torch.tensor([2.0] * 4 + [-3.0] * 4)
    tiny_model.register_to_config(scaling_factor=0.8)
    tiny_model.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def values_of(saved_tokenizer, image_folder, tmp_path) -> Callable[..., dict[str, Any]]:
    """The mapping of a tiny generator's recipe, with overrides as on the command line."""

    def make(*overrides: str, output: str = "generator") -> dict[str, Any]:
        values: dict[str, Any] = {
            "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2},
            "tokenizer": str(saved_tokenizer),
            "output": str(tmp_path / output),
            "data": {"source": str(image_folder), "num_workers": 0},
            "loss": {"objective": "ddpm"},
            "train": {"epochs": None, "steps": 40, "batch_size": 8, "precision": "fp32", "learning_rate": 2e-3,
                      "log_every": 6, "checkpoint_every": 15, "picture_every": 0, "tensorboard": False},
            "sampling": {"num_inference_steps": 2, "precision": "fp32"},
        }  # fmt: skip
        return apply_overrides(values, overrides)

    return make


@pytest.fixture
def make_generator(values_of) -> Callable[..., GeneratorRun]:
    """The same, resolved."""
    return lambda *overrides, output="generator": GeneratorRun.from_mapping(values_of(*overrides, output=output))


@pytest.fixture
def cache(tiny_model, saved_tokenizer, image_folder, tmp_path) -> Path:
    """The latents of the images and of the mirrored images."""
    encode(tiny_model, open_source(image_folder), tmp_path / "latents", shard_size=10, progress=False)
    return tmp_path / "latents"


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / METRICS) if line["kind"] == "train"]


def stop_at(monkeypatch, step: int) -> None:
    """As if SIGTERM came during that step."""
    own = Engine.optimizer_step

    def patched(engine: Engine, grad_norm: torch.Tensor) -> None:
        own(engine, grad_norm)
        if engine.step == step:
            engine.signals.received = int(signal.SIGTERM)

    monkeypatch.setattr(Engine, "optimizer_step", patched)


def newest(folder: str | Path) -> checkpoint.Checkpoint:
    found, _ = checkpoint.newest_valid(Path(folder) / "checkpoints")
    assert found is not None
    return found


# Going on


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "encoded"])
def test_a_run_that_was_stopped_and_gone_on_with_equals_one_that_was_not(
    make_generator, cache, monkeypatch, assert_same_runs, objective, cached
):
    settings = (f"loss.objective={objective}", "train.accumulation=2", "train.ema_decay=0.99",
                *([f"latents={cache}"] if cached else ["data.flip=true", "data.crop=random"]))  # fmt: skip
    clean = train_generator(make_generator(*settings, output="clean"))
    stopped = make_generator(*settings, output="stopped")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 20)  # no multiple of log_every (6), checkpoint_every (15) or the 3 steps of an epoch
        train_generator(stopped)
    assert checkpoint.all_steps(Path(stopped.output) / "checkpoints")[-1] == 20
    train_generator(stopped, resume=True)
    assert_same_runs(clean, stopped.output)
    assert [line["step"] for line in read_metrics(clean / METRICS)] == [6, 12, 18, 24, 30, 36, 40]


def test_a_run_with_muon_goes_on_bit_for_bit_too(make_generator, monkeypatch, assert_same_runs):
    settings = ("train.optimizer=muon", "train.steps=9")
    clean = train_generator(make_generator(*settings, output="clean"))
    stopped = make_generator(*settings, output="stopped")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        train_generator(stopped)
    train_generator(stopped, resume=True)
    assert_same_runs(clean, stopped.output)


def test_accumulation_changes_the_loss_by_rounding_only(make_generator):
    one, two = (
        losses(
            train_generator(make_generator("train.log_every=1", "train.steps=8", f"train.accumulation={n}", output=n))
        )
        for n in ("1", "2")
    )
    assert len(one) == 8 and two == pytest.approx(one, rel=1e-5)


def test_workers_and_gradient_checkpointing_change_nothing(make_generator, cache):
    settings = ("train.log_every=1", "train.steps=5", f"latents={cache}")
    plain = losses(train_generator(make_generator(*settings, output="plain")))
    more = ("data.num_workers=2", "train.gradient_checkpointing=true")
    assert losses(train_generator(make_generator(*settings, *more, output="other"))) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    "override",
    ["seed=1", "loss.objective=flow", "normalization=scalar", "loss.class_dropout=0.2", "data.flip=true",
     "train.batch_size=4", "model.num_layers=1", "latents={cache}"],
)  # fmt: skip
def test_another_run_in_the_place_of_this_one_is_refused_with_what_differs(make_generator, cache, override):
    folder = train_generator(make_generator("train.steps=2"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        train_generator(make_generator("train.steps=4", override.format(cache=cache)), resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_image_size_of_an_autoencoder_that_takes_any_is_another_run(make_generator, tmp_path):
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    settings = (f"tokenizer={tmp_path / 'tiny'}", "train.steps=2")
    train_generator(make_generator(*settings, "image_size=8"))
    with pytest.raises(ConfigError, match="image_size: 8 before, 16 now"):
        train_generator(make_generator(*settings, "image_size=16"), resume=True)


# Learning


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_the_loss_falls_on_a_small_set(make_generator, tiny_model, saved_tokenizer, image_folder, tmp_path, objective):
    six = {"posterior": "mode", "flip": False, "limit": 6, "progress": False}
    encode(tiny_model, open_source(image_folder), tmp_path / "six", **six)
    settings = (f"loss.objective={objective}", f"latents={tmp_path / 'six'}", "train.steps=160", "train.log_every=40",
                "train.optimizer=muon", "train.learning_rate=1e-2", "loss.class_dropout=0",
                "model.hidden_size=64")  # fmt: skip
    found = losses(train_generator(make_generator(*settings)))
    assert found[-1] < 0.85 * found[0], found


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_a_line_of_metrics_has_every_term(make_generator, objective):
    line = read_metrics(train_generator(make_generator("train.steps=6", f"loss.objective={objective}")) / METRICS)[0]
    terms = {"mse", "vlb"} if objective == "ddpm" else {"mse"}
    state = {"kind", "step", "samples_seen", "elapsed", "learning_rate", "images_per_second", "bad_images", "grad_norm"}
    assert line.keys() == terms | state | {"loss"}
    assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)


def test_bf16_learns_nearly_the_same(make_generator):
    runs = [make_generator("train.steps=12", f"train.precision={p}", output=p) for p in ("fp32", "bf16")]
    full, half = (losses(train_generator(run)) for run in runs)
    assert half != full and half == pytest.approx(full, rel=0.03)


def test_the_label_table_and_vectors_do_not_decay(make_generator):
    model = DiT(sample_size=4, hidden_size=32, num_layers=1, num_heads=2)
    run = make_generator("train.weight_decay=0.05", "train.optimizer=muon")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in make_optimizers(model, run.train) for group in optimizer.param_groups]
    decays = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays.keys() == set(names.values())
    assert {name for name, decay in decays.items() if not decay} == {
        name for name, parameter in model.named_parameters() if parameter.ndim < 2 or name == "class_embed.weight"
    }


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "encoded"])
@pytest.mark.parametrize("normalization", ["channel", "scalar"])
def test_the_network_is_shown_normalised_latents(make_generator, cache, monkeypatch, normalization, cached):
    seen = []
    own = FlowLoss.forward

    def listen(self: FlowLoss, predict: Any, latents: torch.Tensor, *rest: Any) -> Any:
        seen.append(latents)
        return own(self, predict, latents, *rest)

    monkeypatch.setattr(FlowLoss, "forward", listen)
    settings = ("loss.objective=flow", f"normalization={normalization}", "train.steps=30",
                *([f"latents={cache}"] if cached else []))  # fmt: skip
    folder = train_generator(make_generator(*settings))
    latents = torch.cat(seen)
    config = newest(folder).state["model"]
    if normalization == "scalar":
        assert config["latents_mean"] == [0.0] * 4 and config["latents_std"] == [1 / 0.8] * 4
        assert latents.mean(dim=(0, 2, 3)) == pytest.approx(torch.full((4,), 2 * 0.8), abs=0.4)
        return
    # 240 samples of 16 numbers, in which those of an image are alike.
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.15
    assert latents.std(dim=(0, 2, 3)) == pytest.approx(torch.ones(4), rel=0.15)
    # Ten epochs of the same 24 images: no sample came twice, so each epoch drew its own.
    assert len({row.numpy().tobytes() for row in latents}) == 240


def test_with_the_scalar_factor_that_a_tokenizer_measured_all_latents_together_are_standard(
    make_generator, tiny_model, cache, saved_tokenizer, monkeypatch
):
    manifest = json.loads((cache / "manifest.json").read_text())
    tiny_model.register_to_config(scaling_factor=manifest["scaling_factor"])
    tiny_model.save_pretrained(saved_tokenizer)
    seen = []
    own = DDPMLoss.forward

    def listen(self: DDPMLoss, predict: Any, latents: torch.Tensor, *rest: Any) -> Any:
        seen.append(latents)
        return own(self, predict, latents, *rest)

    monkeypatch.setattr(DDPMLoss, "forward", listen)
    train_generator(make_generator("normalization=scalar", f"latents={cache}", "train.steps=15"))
    assert torch.cat(seen).std().item() == pytest.approx(1.0, rel=0.05)


# What is left behind


@dataclass
class Seen:
    """Tools that remember what they were shown, and do what they are for."""

    judged: list[dict[str, torch.Tensor]] = field(default_factory=list)
    painted: list[dict[str, torch.Tensor]] = field(default_factory=list)
    exported: list[list[str]] = field(default_factory=list)

    def judge(self, model: DiT, tokenizer: Any, run: Any, accelerator: Any) -> Found:
        self.judged.append({name: p.detach().clone() for name, p in model.named_parameters()})
        torch.rand(3)  # an evaluation may use the global generator
        model.eval()
        return Found({"fid": float(len(self.judged))})

    def paint(self, model: DiT, tokenizer: Any, run: Any, classes: list[str]) -> Image.Image:
        self.painted.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return Image.new("RGB", (8, 8), "red")

    def export(self, model: DiT, tokenizer: Any, run: Any, classes: list[str]) -> Any:
        self.exported.append(classes)
        return TOOLS.export(model, tokenizer, run, classes)

    @property
    def tools(self) -> Tools:
        return Tools(self.judge, self.paint, self.export)


@dataclass
class Found:
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics}


def test_pictures_and_figures_are_made_of_the_average_when_they_are_due(make_generator):
    seen = Seen()
    run = make_generator("train.steps=12", "eval.every=5", "train.picture_every=5", "train.checkpoint_every=5",
                         "train.keep_checkpoints=3")  # fmt: skip
    folder = train_generator(run, tools=seen.tools)
    evaluated = [(line["step"], line["fid"]) for line in read_metrics(folder / METRICS) if line["kind"] == "eval"]
    assert evaluated == [(5, 1.0), (10, 2.0), (12, 3.0)]
    assert json.loads((folder / "eval.json").read_text()) == {"metrics": {"fid": 3.0}}
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == ["step-00000005.png", "step-00000010.png", "step-00000012.png"]
    assert seen.exported == [["a", "b", "c"]]
    for step, judged, painted in zip((5, 10, 12), seen.judged, seen.painted, strict=True):
        ema = checkpoint.load(folder / "checkpoints" / f"step-{step:08d}").tensors["ema"]
        assert all(torch.equal(judged[name], ema[name]) and torch.equal(painted[name], ema[name]) for name in ema)


def test_what_is_looked_at_does_not_change_the_training(make_generator):
    plain = train_generator(make_generator("train.steps=8", output="plain"))
    settings = ("train.steps=8", "eval.every=2", "train.picture_every=3")
    watched = train_generator(make_generator(*settings, output="watched"), tools=Seen().tools)
    assert losses(plain) == losses(watched)
    one, other = (newest(folder).tensors["model"] for folder in (plain, watched))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_picture_of_samples_is_repeatable(make_generator):
    run = make_generator("train.steps=3", "train.picture_every=3")
    folder = train_generator(run, tools=TOOLS_TO_SEE)
    with Image.open(folder / "pictures" / "step-00000003.png") as image:
        picture = image.convert("RGB").tobytes()
    pipeline = load_pipeline(folder)
    again = TOOLS.paint(pipeline.transformer, Autoencoder(pipeline.vae), run, ["a", "b", "c"])
    assert again.convert("RGB").tobytes() == picture


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_a_finished_run_holds_a_pipeline_of_the_average_with_classes_and_statistics(make_generator, objective):
    run = make_generator("train.steps=6", f"loss.objective={objective}")
    folder = train_generator(run, tools=TOOLS_TO_SEE)
    ema, config = newest(folder).tensors["ema"], newest(folder).state["model"]
    for pipeline in (load_pipeline(folder), HieraTokPipeline.from_pretrained(folder / "pipeline")):
        model = pipeline.transformer
        assert all(torch.equal(parameter, ema[name]) for name, parameter in model.named_parameters())
        assert (model.config.latents_mean, model.config.latents_std) == (config["latents_mean"], config["latents_std"])
        assert model.learns_variance == (objective == "ddpm") and model.num_classes == 3
        assert pipeline.class_names == ["a", "b", "c"]
        assert pipeline(["b"], 1.5, 2, output_type="uint8").images.shape == (1, 3, 32, 32)
    record = json.loads((folder / "run.json").read_text())
    assert record["kind"] == "generator" and record["classes"] == ["a", "b", "c"]
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert not (folder / "model").exists()


def test_without_tools_the_average_is_saved_alone(make_generator):
    folder = train_generator(make_generator("train.steps=3"))
    model, ema = DiT.from_pretrained(folder / "model"), newest(folder).tensors["ema"]
    assert all(torch.equal(parameter, ema[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_of_a_run_that_is_not_finished_the_pipeline_is_the_average_so_far(make_generator, monkeypatch, objective):
    run = make_generator("train.steps=12", f"loss.objective={objective}")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        train_generator(run, tools=TOOLS_TO_SEE)
    unfinished, ema = load_pipeline(run.output), newest(run.output).tensors["ema"]
    assert all(torch.equal(p, ema[name]) for name, p in unfinished.transformer.named_parameters())
    assert unfinished.class_names == ["a", "b", "c"] and not unfinished.transformer.training
    ended = load_pipeline(train_generator(run, resume=True, tools=TOOLS_TO_SEE))
    assert type(ended.scheduler) is type(unfinished.scheduler)
    assert ended.transformer.config.latents_std == unfinished.transformer.config.latents_std
    early, late = (p(["a"], 1.0, 2, torch.Generator().manual_seed(0), output_type="uint8").images.int()
                   for p in (unfinished, ended))  # fmt: skip
    assert early.shape == (1, 3, 32, 32) and not torch.equal(early, late)


def test_a_run_without_a_checkpoint_or_of_a_tokenizer_holds_no_generator(make_generator, make_run):
    run = make_generator("train.steps=2")
    folder = train_generator(run)
    for path in (folder / "checkpoints").iterdir():
        path.rename(folder / path.name)
    with pytest.raises(CheckpointError, match="holds no generator yet"):
        load_pipeline(folder)
    with pytest.raises(CheckpointError, match="holds no generator yet"):
        load_pipeline(train_tokenizer(make_run("train.steps=1", output="other")))


# Refused before anything is written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.sample_size=8", "model.sample_size is 8, but the latents have 4; leave it out"),
        ("model.in_channels=3", "model.in_channels is 3, but the latents have 4"),
        ("model.num_classes=1000", "model.num_classes is 1000, but the latents have 3"),
        ("model.out_channels=5", "out_channels 5 is neither in_channels 4 nor twice"),
        ("model.num_heads=5", "hidden_size 32 is not divisible by num_heads 5"),
        ("train.accumulation=3", "train.batch_size 8 is not divisible by train.accumulation 3"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_is_written(make_generator, override, message):
    run = make_generator(override, output="refused")
    with pytest.raises(ConfigError, match=message):
        train_generator(run)
    assert not Path(run.output).exists()


def test_a_flow_has_no_variance_to_learn(make_generator):
    with pytest.raises(ConfigError, match=r"model.out_channels must be 4 for loss.objective=flow"):
        train_generator(make_generator("loss.objective=flow", "model.out_channels=8"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer=null", "give the tokenizer whose latents are to be learned"),
        ("model.hiden_size=32", "unknown key 'model.hiden_size'; did you mean 'hidden_size'"),
        ("model.preset=dit-xll", "no model preset 'dit-xll'"),
        ("loss.objective=flw", "'loss.objective' is 'flw'; did you mean 'flow'"),
        ("normalization=chanel", "'normalization' is 'chanel'; did you mean 'channel'"),
        ("sampling.guidance_interval=[1, 0]", "sampling.guidance_interval is"),
        ("sampling.guidance_scale=-1", "sampling.guidance_scale is -1"),
        ("eval.num_images=0", "eval.num_images is 0"),
        ("eval.every=-1", "eval.every is -1"),
        ("eval.labels=datta", "did you mean 'data'"),
        ("seed=-1", "seed is -1"),
        ("latent=here", "unknown key 'latent'; did you mean 'latents'"),
        ("train.stepz=3", "did you mean 'steps'"),
    ],
)
def test_an_error_in_a_recipe_names_the_field(make_generator, override, message):
    with pytest.raises(ConfigError, match=message):
        make_generator(override)


def test_the_latents_of_another_tokenizer_are_refused(make_generator, cache, tiny_model, saved_tokenizer):
    tiny_model.decoder.project.bias.data.add_(1)
    tiny_model.save_pretrained(saved_tokenizer)
    run = make_generator(f"latents={cache}", output="refused")
    with pytest.raises(ConfigError, match="made by another tokenizer"):
        train_generator(run)
    assert not Path(run.output).exists()


def test_a_tokenizer_that_is_not_there_is_refused(make_generator, tmp_path):
    (tmp_path / "nothing").mkdir()
    run = make_generator(f"tokenizer={tmp_path / 'nothing'}", output="refused")
    with pytest.raises(CheckpointError, match="nothing"):
        train_generator(run)
    assert not Path(run.output).exists()


# Numbers that are not finite


@pytest.mark.parametrize(("objective", "loss"), [("ddpm", DDPMLoss), ("flow", FlowLoss)])
def test_a_step_with_nan_is_not_taken_and_the_run_can_go_on(
    make_generator, monkeypatch, assert_same_runs, objective, loss
):
    settings = (f"loss.objective={objective}", "train.steps=12", "train.checkpoint_every=5")
    clean = train_generator(make_generator(*settings, output="clean"))
    run = make_generator(*settings)
    own, calls = loss.forward, iter(range(1, 1000))

    def broken(self: Any, *arguments: Any) -> Any:
        found = own(self, *arguments)
        return found._replace(total=found.total * math.nan) if next(calls) == 8 else found

    with monkeypatch.context() as patch:
        patch.setattr(loss, "forward", broken)
        with pytest.raises(NonFiniteError, match=r"step 8: .*nan.*--resume"):
            train_generator(run)
    record = json.loads((Path(run.output) / "nonfinite.json").read_text())
    assert record["step"] == 8 and len(record["samples"]) == 8
    assert checkpoint.all_steps(Path(run.output) / "checkpoints") == [5]
    train_generator(run, resume=True)
    assert_same_runs(clean, run.output)


# Recipes


GENERATORS = [name for name in recipe_names() if recipe_kind(name) == "generator"]


@pytest.mark.parametrize("recipe", GENERATORS)
def test_every_recipe_of_a_generator_lacks_its_tokenizer_only(recipe, tmp_path):
    with pytest.raises(ConfigError, match="tokenizer=RUN_FOLDER_OR_MODEL"):
        GeneratorRun.from_mapping(load_recipe(recipe))
    run = GeneratorRun.from_mapping(apply_overrides(load_recipe(recipe), ["tokenizer=runs/mine"]))
    assert run.tokenizer == "runs/mine" and run.loss.objective in ("ddpm", "flow")
    with torch.device("meta"):
        build_dit(run.model)


def test_the_papers_recipe_is_that_of_table_11():
    assert {"dit-b", "dit-l", "dit-xl", "dit-small"} <= set(GENERATORS)
    run = GeneratorRun.from_mapping({**load_recipe("dit-xl"), "tokenizer": "mine"})
    assert (dit_fields(run.model)["hidden_size"], run.train.steps, run.train.batch_size) == (1152, 400_000, 256)
    assert (run.train.learning_rate, run.train.final_learning_rate, run.train.weight_decay) == (1e-4, 1e-4, 0.0)
    assert (run.loss.objective, run.loss.class_dropout, run.train.ema_decay) == ("ddpm", 0.1, 0.9999)
    assert (run.sampling.scheduler, run.sampling.num_inference_steps, run.sampling.guidance_scale) == ("ddpm", 250, 1.0)
    assert run.eval.num_images == 50_000


# Several processes

SCRIPT = """
import json
from hieratok.engine.loop import Engine
from hieratok.training.generator import GeneratorRun, train_generator

keys, backward = [], Engine.backward
def listen(engine, loss, terms, batch):
    keys.append(batch.keys)
    backward(engine, loss, terms, batch)
Engine.backward = listen
for name, recipe in values.items():
    keys.clear()
    train_generator(GeneratorRun.from_mapping(recipe))
    json.dump(keys, open(f"{folder}/{name}-{rank}.json", "w"))
"""


@pytest.mark.slow
def test_two_processes_see_the_batches_of_one_and_learn_what_it_does(
    values_of, make_generator, monkeypatch, tmp_path, cache, in_two_processes
):
    shared = ("train.steps=8", "train.log_every=1", "train.accumulation=2")
    settings = {"encoded": (*shared, "data.flip=true"), "cached": (*shared, f"latents={cache}", "loss.objective=flow")}
    values = {name: values_of(*changes, output=f"two-{name}") for name, changes in settings.items()}
    in_two_processes(SCRIPT, folder=str(tmp_path), values=values)

    keys: list[list[str]] = []
    backward = Engine.backward

    def listen(engine: Engine, loss: torch.Tensor, terms: Any, batch: Any) -> None:
        keys.append(batch.keys)
        backward(engine, loss, terms, batch)

    monkeypatch.setattr(Engine, "backward", listen)
    for name, changes in settings.items():
        keys.clear()
        one = train_generator(make_generator(*changes, output=f"one-{name}"))
        parts = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert [first + second for first, second in zip(*parts, strict=True)] == keys
        assert len(keys) == 16 and all(len(part) == 4 for part in keys)
        two = Path(values[name]["output"])
        assert json.loads((two / "run.json").read_text())["world_size"] == 2
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
