"""Stage 2: discriminators and alignment within a tokenizer's training, from the weights of another run."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hieratok import load_tokenizer
from hieratok.cli import main
from hieratok.data.bad import BadSamples
from hieratok.data.loader import train_loader
from hieratok.engine import checkpoint
from hieratok.engine.guards import Stopped
from hieratok.engine.log import METRICS, read_metrics
from hieratok.engine.loop import Engine, make_accelerator, make_engine
from hieratok.errors import CheckpointError, ConfigError, NonFiniteError
from hieratok.models.autoencoder import state_sha256
from hieratok.training.stage2 import Watch
from hieratok.training.tokenizer import TokenizerRun, make_model, make_terms, train_tokenizer

GAN = ("loss.adversarial.weight=0.6", "discriminator.kind=patchgan", "discriminator.width=0.125")
EVERYTHING = (
    *GAN, "loss.alignment.weight=0.1", "loss.adversarial.lecam=0.001", "loss.adversarial.r1=0.1",
    "loss.adversarial.r1_every=2", "loss.adversarial.augment=[color,translation,cutout]",
    "loss.adversarial.ramp_steps=3",
)  # fmt: skip


def train_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / METRICS) if line["kind"] == "train"]


def newest(folder: str | Path) -> checkpoint.Checkpoint:
    found, _ = checkpoint.newest_valid(Path(folder) / "checkpoints")
    assert found is not None
    return found


def images_of(run: TokenizerRun) -> Tensor:
    loader = train_loader(run.data.open("val"), run.data.frame(32), seed=0, batch_size=4)
    return next(iter(loader)).images.float() / 127.5 - 1


def at_step(monkeypatch, step: int, act: Callable[[Engine], None]) -> None:
    """Do something to the engine right after the optimizer's step of that number."""
    own = Engine.optimizer_step

    def patched(engine: Engine, grad_norms: dict[str, Tensor]) -> None:
        own(engine, grad_norms)
        if engine.step == step:
            act(engine)

    monkeypatch.setattr(Engine, "optimizer_step", patched)


@pytest.fixture
def stage1(make_run) -> Path:
    """A finished run of the first stage."""
    return train_tokenizer(make_run("train.steps=6", "train.ema_decay=0.5", output="stage1"))


@pytest.fixture
def parts(make_run, tmp_path) -> Callable[..., tuple[Any, ...]]:
    """Engine, criterion, terms, a batch, and the images of it, of a run that has not begun."""

    def make(*overrides: str) -> tuple[Any, ...]:
        run = make_run("train.batch_size=4", *overrides)
        accelerator = make_accelerator(run.train, run.seed)
        model, criterion = make_model(run, accelerator.device)
        engine = make_engine(run.train, tmp_path / "unused", accelerator, model, 18, BadSamples(18, 1.0))
        terms = make_terms(run, model, engine)
        batch = next(iter(train_loader(run.data.open("train"), run.data.frame(32), seed=0, batch_size=4)))
        return engine, criterion, terms, batch, batch.images.float() / 127.5 - 1

    return make


# What learns from what


def gradients(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def length(loss: Tensor, layer: Tensor) -> float:
    """Of a loss's gradient at a layer."""
    return float(torch.autograd.grad(loss, layer, retain_graph=True)[0].norm())


def test_the_tokenizers_step_leaves_no_gradient_in_the_discriminator_and_the_other_way_round(parts):
    engine, criterion, terms, batch, images = parts(*EVERYTHING)
    output = engine.forward(images, generator=torch.Generator().manual_seed(0))
    found = criterion(output, images)
    judged, _ = terms.adversary.term(found.reconstruction, output, batch)
    judged.backward(retain_graph=True)
    assert gradients(engine.model) and not gradients(terms.adversary.network)
    assert all(p.requires_grad for p in terms.adversary.network.parameters())

    engine.model.zero_grad(set_to_none=True)
    terms.adversary.learn(images, output, batch)
    assert gradients(terms.adversary.network) and not gradients(engine.model)


def test_the_adversarial_gradient_at_the_last_layer_is_as_long_as_the_reconstructions_times_the_weight(parts):
    """Eq. 7 of VQGAN, seen from its end: what reaches the last layer."""
    engine, criterion, terms, batch, images = parts(*GAN)
    output = engine.forward(images, generator=torch.Generator().manual_seed(0))
    found = criterion(output, images)
    judged, named = terms.adversary.term(found.reconstruction, output, batch)
    layer = engine.model.decoder.to_pixels[0].weight
    ours, theirs = (
        torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (judged, found.reconstruction)
    )
    assert float(ours / theirs) == pytest.approx(0.6, rel=0.02)  # eps keeps it a little below
    product = float(named["adversarial_weight"] * named["adversarial"])
    assert product == pytest.approx(float(judged.detach()), rel=1e-5)


def test_the_alignments_gradient_at_the_encoders_last_layer_is_a_tenth_of_the_reconstructions(parts):
    engine, criterion, terms, batch, images = parts("loss.alignment.weight=0.1")
    output = engine.forward(images, generator=torch.Generator().manual_seed(0))
    found = criterion(output, images)
    aligned, named = terms.aligner.term(found.reconstruction, output, images)
    layer = engine.model.encoder.moments.weight
    ours, theirs = (
        torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (aligned, found.reconstruction)
    )
    assert float(ours / theirs) == pytest.approx(0.1, rel=0.02)
    assert set(named) == {"alignment", "alignment_cos", "alignment_distance", "alignment_weight"}


def test_without_weights_there_is_nothing_of_stage_2(parts):
    engine, _, terms, _, _ = parts()
    assert (terms.adversary, terms.aligner) == (None, None) and list(engine.learners) == ["model"]


def test_chosen_scales_are_judged_each_by_its_own_discriminator(make_run):
    scales = ("loss.adversarial.scales=[2,4]", "train.steps=4", "train.log_every=2")
    folder = train_tokenizer(make_run(*GAN, *scales, "discriminator.kind=stylegan"))
    line = train_lines(folder)[-1]
    for name in ("discriminator", "logits_real", "logits_fake", "accuracy", "adversarial"):
        assert line[name] == pytest.approx((line[f"{name}/2"] + line[f"{name}/4"]) / 2, rel=1e-4, abs=1e-6)
    networks = {name.split(".")[2] for name in newest(folder).tensors["discriminator"]}
    assert networks == {"0", "1"}


@pytest.mark.parametrize(
    "variant",
    [
        ("model.scales=[4]",),
        ("model.downsampler=interpolation", "model.attention_pattern=full"),
        ("model.attention_pattern=scale_independent", "loss.adversarial.scales=[2,4]", "discriminator.kind=stylegan"),
        ("model.pixel_head=per_scale", "loss.adversarial.scales=[2]", "discriminator.kind=stylegan"),
        ("loss.adversarial.scales=[1,2,4]", "loss.adversarial.sharing=shared"),
        ("loss.adversarial.loss=non_saturating", "discriminator.kind=dino"),
    ],
)
def test_every_variant_of_the_model_takes_both_terms(make_run, variant):
    settings = (*GAN, "loss.alignment.weight=0.1", "train.steps=2", "train.log_every=1", *variant)
    for line in train_lines(train_tokenizer(make_run(*settings))):
        assert line["adversarial_weight"] > 0 and line["alignment_weight"] > 0
        assert line["grad_norm"] > 0 and line["grad_norm_discriminator"] > 0 and line["grad_norm_alignment"] > 0


# Time


@pytest.mark.parametrize("update", ["simultaneous", "alternate"])
def test_the_tokenizer_meets_the_discriminator_at_its_start_and_the_discriminator_learns_before(make_run, update):
    steps = ("loss.adversarial.discriminator_start_step=2", "loss.adversarial.start_step=4",
             "loss.adversarial.ramp_steps=2", "loss.adversarial.adaptive=false", "train.steps=7",
             "train.log_every=1")  # fmt: skip
    lines = train_lines(train_tokenizer(make_run(*GAN, *steps, f"loss.adversarial.update={update}")))
    assert ["grad_norm_discriminator" in line for line in lines] == ["discriminator" in line for line in lines]
    assert ["discriminator" in line for line in lines] == [False, False, True, True, True, True, True]
    assert [line.get("adversarial_weight", 0.0) for line in lines] == pytest.approx([0, 0, 0, 0, 0.3, 0.6, 0.6])
    rates = [line.get("learning_rate_discriminator") for line in lines]
    assert rates[:2] == [None, None] and rates[2] > rates[-1] > 0  # its cosine begins when it does


def test_a_term_that_is_not_in_every_step_is_averaged_over_the_steps_that_it_is_in(make_run):
    settings = ("loss.adversarial.adaptive=false", "loss.adversarial.start_step=4", "train.steps=6")
    (line,) = train_lines(train_tokenizer(make_run(*GAN, *settings, "train.log_every=6")))
    assert line["adversarial_weight"] == pytest.approx(0.6)


def test_a_run_made_longer_keeps_its_discriminator_learning(make_run):
    settings = ("loss.adversarial.start_step=4", "train.log_every=1")
    train_tokenizer(make_run(*GAN, *settings, "train.steps=8"))
    lines = train_lines(train_tokenizer(make_run(*GAN, *settings, "train.steps=24"), resume=True))
    assert len(lines) == 24 and all(line["learning_rate_discriminator"] > 1e-5 for line in lines[8:20])


@pytest.mark.parametrize(
    ("update", "kind"),
    [("simultaneous", "patchgan"), ("alternate", "patchgan"), ("simultaneous", "stylegan"), ("simultaneous", "dino")],
)
def test_a_run_stopped_on_either_side_of_the_gans_start_goes_on_bit_for_bit(
    make_run, monkeypatch, assert_same_runs, update, kind
):
    settings = (
        *EVERYTHING, "loss.lpips=1.0", "loss.adversarial.discriminator_start_step=4", "loss.adversarial.start_step=6",
        f"loss.adversarial.update={update}", f"discriminator.kind={kind}", "train.steps=10", "train.log_every=3",
        "train.ema_decay=0.9", "loss.adversarial.scales=[2,4]" if kind == "stylegan" else "train.log_every=3",
    )  # fmt: skip
    clean = train_tokenizer(make_run(*settings, output="clean"))
    stopped = make_run(*settings, output="stopped")
    for step in (3, 5, 8):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda engine: setattr(engine.signals, "received", int(signal.SIGTERM)))
            with pytest.raises(Stopped):
                train_tokenizer(stopped, resume=step > 3)
    train_tokenizer(stopped, resume=True)
    assert_same_runs(clean, stopped.output)
    kept = set(newest(clean).tensors)
    assert {"discriminator", "discriminator-optimizer", "alignment", "alignment-optimizer", "ema"} <= kept
    assert not any("discriminator" in name or "projection" in name for name in newest(clean).tensors["ema"])


def test_accumulation_gives_both_networks_the_gradients_of_the_whole_batch(make_run):
    settings = (*GAN, "loss.adversarial.adaptive=false", "train.steps=3", "train.log_every=1",
                "loss.alignment.weight=0.1", "loss.alignment.adaptive=false")  # fmt: skip
    whole, in_parts = (
        train_lines(train_tokenizer(make_run(*settings, f"train.accumulation={n}", output=f"run{n}"))) for n in (1, 2)
    )
    for a, b in zip(whole, in_parts, strict=True):
        for name in ("loss", "discriminator", "adversarial", "alignment", "grad_norm", "grad_norm_discriminator"):
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), name


def test_two_processes_train_both_networks_as_one_does(make_values, make_run, in_two_processes, tmp_path):
    settings = (*GAN, "loss.alignment.weight=0.1", "train.steps=4", "train.log_every=1",
                "loss.adversarial.lecam=0.01", "loss.adversarial.r1=0.1", "loss.adversarial.r1_every=2",
                "loss.adversarial.update=alternate")  # fmt: skip
    one = train_lines(train_tokenizer(make_run(*settings, output="one")))
    in_two_processes(
        "from hieratok.training.tokenizer import TokenizerRun, train_tokenizer\n"
        "train_tokenizer(TokenizerRun.from_mapping(values))\n",
        values=make_values(*settings, output="two"),
    )
    two = train_lines(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "discriminator", "lecam", "adversarial_weight", "alignment_weight",
                     "grad_norm_discriminator"):  # fmt: skip
            assert b[name] == pytest.approx(a[name], rel=5e-3), name


def test_gradient_checkpointing_serves_the_adaptive_weights_too(make_run):
    settings = (*GAN, "loss.alignment.weight=0.1", "train.steps=3", "train.log_every=1")
    plain, recomputed = (
        train_lines(train_tokenizer(make_run(*settings, f"train.gradient_checkpointing={on}", output=f"run-{on}")))
        for on in ("false", "true")
    )
    for a, b in zip(plain, recomputed, strict=True):
        for name in ("loss", "adversarial_weight", "alignment_weight"):
            assert b[name] == pytest.approx(a[name], rel=1e-5)


def test_a_vit_of_timm_serves_both_terms_and_r1_with_them(make_run, tmp_path):
    import timm

    network = timm.create_model("test_vit", pretrained=False, img_size=32)
    timm.models.save_for_hf(network, str(tmp_path / "vit"), safe_serialization=True)
    settings = ("loss.adversarial.weight=0.6", "discriminator.kind=dino", "loss.adversarial.r1=1",
                f"discriminator.foundation={tmp_path / 'vit'}", "loss.alignment.weight=0.1",
                f"loss.alignment.foundation={tmp_path / 'vit'}", "train.steps=2", "train.log_every=1")  # fmt: skip
    folder = train_tokenizer(make_run(*settings))
    assert train_lines(folder)[0]["r1"] > 0
    terms = json.loads((folder / "run.json").read_text())["terms"]
    assert terms["adversarial"].startswith("dino discriminator on the features of vit (")
    assert terms["alignment"].startswith("VF loss against vit (")


def test_alternating_steps_cannot_be_spread_over_micro_batches(make_run):
    with pytest.raises(ConfigError, match="accumulation"):
        train_tokenizer(make_run(*GAN, "loss.adversarial.update=alternate", "train.accumulation=2"))


# Faults


@pytest.mark.parametrize("network", ["discriminator", "alignment"])
def test_a_number_that_is_not_finite_in_any_network_stops_the_run_before_it_does_harm(make_run, monkeypatch, network):
    run = make_run(*EVERYTHING, "train.steps=6", "train.checkpoint_every=2")

    def spoil(engine: Engine) -> None:
        next(iter(engine.learners[network].network.parameters())).data.fill_(math.nan)

    at_step(monkeypatch, 3, spoil)
    with pytest.raises(NonFiniteError, match="nan"):
        train_tokenizer(run)
    assert newest(run.output).step == 2
    assert json.loads((Path(run.output) / "nonfinite.json").read_text())["step"] == 4


class Logs:
    """An engine's ear for warnings."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


class Rate:
    rate = 1e-4


def values(accuracy: float, real: float, fake: float) -> dict[str, float]:
    return {"accuracy": accuracy, "logits_real": real, "logits_fake": fake}


@pytest.mark.parametrize(
    ("state", "words"), [(values(0.99, 3.0, -3.0), "has won"), (values(0.5, 0.01, 0.012), "tells nothing apart")]
)
def test_a_discriminator_that_has_won_or_collapsed_is_reported_once_when_it_has_lasted(state, words):
    logs = Logs()
    watch = Watch(Rate(), logs)  # type: ignore[arg-type]
    for step in range(Watch.LASTING - 1):
        watch(step, state)
    assert logs.said == []
    watch(9, values(0.75, 1.0, -0.5))  # it recovers, and the count begins again
    for step in range(10, 10 + 3 * Watch.LASTING):
        watch(step, state)
    watch(40, values(0.75, 1.0, -0.5))
    for step in range(41, 41 + 2 * Watch.LASTING):
        watch(step, state)
    assert len(logs.said) == 1 and words in logs.said[0] and "discriminator.learning_rate" in logs.said[0]


def test_a_run_that_goes_on_remembers_what_it_had_seen():
    won = values(0.99, 3.0, -3.0)
    for before, expected in ((3, 1), (Watch.LASTING, 0)):  # in a streak; warned already
        logs = Logs()
        watch = Watch(Rate(), logs)  # type: ignore[arg-type]
        watch.recall([{"kind": "train", **won}] * before + [{"kind": "eval", "psnr": 20.0}])
        assert logs.said == []
        for step in range(Watch.LASTING - before + 1):
            watch(step, won)
        assert len(logs.said) == expected


def test_a_healthy_game_is_not_reported():
    logs = Logs()
    watch = Watch(Rate(), logs)  # type: ignore[arg-type]
    for step in range(30):
        watch(step, values(0.5 + 0.4 * (step % 2), 0.5, -0.5))
    watch(31, {"loss": 1.0})
    assert logs.said == []


def test_a_warning_stands_in_the_runs_log(make_run, capsys):
    settings = ("discriminator.learning_rate=0.01", "loss.adversarial.start_step=59", "train.steps=60",
                "loss.adversarial.discriminator_start_step=0", "train.log_every=5", "train.learning_rate=1e-8",
                "train.final_learning_rate=0")  # fmt: skip
    folder = train_tokenizer(make_run(*GAN, *settings))  # against a tokenizer that stands still
    (warning,) = [line for line in read_metrics(folder / METRICS) if line["kind"] == "warning"]
    assert "has won" in warning["message"] and warning["samples_seen"] > 0
    assert "warning: step" in capsys.readouterr().err


# Beginning from another run


def test_a_run_begins_with_the_averaged_weights_of_another_and_says_so(make_values, stage1, tmp_path):
    values = make_values("train.steps=1", "train.learning_rate=1e-30", "train.final_learning_rate=0",
                         "train.weight_decay=0", f"init_from={stage1}", output="stage2")  # fmt: skip
    for section in ("model", "data", "loss"):
        del values[section]
    run = TokenizerRun.from_mapping(values)
    assert run.data.source.endswith("images") and run.model["encoder_hidden_size"] == 32 and run.loss.lpips == 0
    before = load_tokenizer(stage1)
    raw = newest(stage1).tensors["model"]
    folder = train_tokenizer(run)
    after = newest(folder).tensors["model"]
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in before.state_dict().items())
    assert not all(torch.allclose(after[name], raw[name], atol=1e-6) for name in raw)  # and not with the last ones
    record = json.loads((folder / "run.json").read_text())["init_from"]
    assert record == {"path": str(stage1), "sha256": state_sha256(before)}


def test_a_saved_model_and_a_checkpoint_are_beginnings_too(make_values, stage1, tmp_path):
    for path in (stage1 / "model", stage1 / "checkpoints" / "step-00000006"):
        values = make_values(f"init_from={path}", "train.steps=1", output=f"from-{path.name}")
        for section in ("model", "data", "loss"):
            del values[section]
        run = TokenizerRun.from_mapping(values)
        assert run.data.source.endswith("images") and run.loss.lpips == 0  # those of the run that they are of
        assert (train_tokenizer(run) / "model").is_dir()
    model = shutil.copytree(stage1 / "model", tmp_path / "given")
    values = make_values(f"init_from={model}", "train.steps=1", output="from-given")
    del values["model"]
    assert (train_tokenizer(TokenizerRun.from_mapping(values)) / "model").is_dir()
    del values["data"]
    with pytest.raises(ConfigError, match="data.source=PATH"):
        TokenizerRun.from_mapping(values)


def test_a_run_keeps_the_record_of_what_it_began_from_whatever_becomes_of_that(make_run, stage1, capsys):
    settings = (f"init_from={stage1}", "train.picture_every=0")
    folder = train_tokenizer(make_run(*settings, "train.steps=2", output="second"))
    record = json.loads((folder / "run.json").read_text())["init_from"]
    train_tokenizer(make_run("train.steps=9", "train.ema_decay=0.5", output="stage1"), resume=True)
    capsys.readouterr()
    train_tokenizer(make_run(*settings, "train.steps=4", output="second"), resume=True)
    assert json.loads((folder / "run.json").read_text())["init_from"] == record
    said = capsys.readouterr().err
    assert "has changed since" in said and "beginning with" not in said


def test_a_run_goes_on_when_the_one_it_began_from_is_gone(make_run, make_values, stage1, monkeypatch, assert_same_runs):
    settings = (f"init_from={stage1}", "train.steps=6", "train.picture_every=3")
    clean = train_tokenizer(make_run(*settings, output="clean"))
    record = json.loads((clean / "run.json").read_text())["init_from"]
    stopped = make_values(*settings, output="stopped")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, 4, lambda engine: setattr(engine.signals, "received", int(signal.SIGTERM)))
        train_tokenizer(TokenizerRun.from_mapping(stopped))
    stage1.rename(stage1.with_name("elsewhere"))
    assert main(["train", "tokenizer", "--resume", f"output={stopped['output']}"]) == 0
    assert json.loads((Path(stopped["output"]) / "run.json").read_text())["init_from"] == record
    assert newest(clean).tensors["model"].keys() == newest(stopped["output"]).tensors["model"].keys()
    for name, tensor in newest(clean).tensors["model"].items():
        assert torch.equal(tensor, newest(stopped["output"]).tensors["model"][name]), name


def test_weights_of_another_shape_are_refused_by_the_fields_that_differ(make_run, stage1):
    with pytest.raises(ConfigError, match="model.encoder_hidden_size: 32 there, 64 here"):
        train_tokenizer(make_run(f"init_from={stage1}", "model.encoder_hidden_size=64", output="other"))
    assert not (stage1.parent / "other").exists()


def test_a_beginning_that_is_not_there_is_named(make_values, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        train_tokenizer(TokenizerRun.from_mapping(make_values(f"init_from={tmp_path / 'nowhere'}")))
    values = make_values()
    del values["model"]
    with pytest.raises(ConfigError, match="init_from=RUN_OR_MODEL"):
        TokenizerRun.from_mapping(values)


def test_pictures_show_the_reconstructions_of_the_run_that_it_began_from(make_run, stage1):
    def picture(*overrides: str, output: str) -> Image.Image:
        folder = train_tokenizer(make_run("train.steps=2", "train.picture_every=2", *overrides, output=output))
        return Image.open(folder / "pictures" / "step-00000002.png")

    plain, beside = picture(output="plain"), picture(f"init_from={stage1}", output="beside")
    columns = 5  # original, three scales, error
    assert beside.size[1] == plain.size[1]
    assert (beside.size[0] + 6) * columns == (plain.size[0] + 6) * (columns + 1)


# The decoder alone


def test_a_frozen_encoder_leaves_every_latent_as_it_is_to_the_bit_while_the_decoder_learns(make_run, stage1):
    settings = (f"init_from={stage1}", "train.freeze=encoder", "train.steps=8", "train.weight_decay=0.1",
                "train.optimizer=muon", "train.ema_decay=0.9")  # fmt: skip
    run = make_run(*GAN, *settings, output="sharper")
    before, after = load_tokenizer(stage1), load_tokenizer(train_tokenizer(run))
    images = images_of(run)
    with torch.no_grad():
        old, new = (model.encode(images).latent_dist for model in (before, after))
    assert torch.equal(old.mode(), new.mode()) and torch.equal(old.logvar, new.logvar)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(old.sample(generator), new.sample(generator.manual_seed(1)))
    changed = [
        name for name, p in before.named_parameters() if not torch.equal(p, dict(after.named_parameters())[name])
    ]
    assert changed and all(name.startswith("decoder.") for name in changed)
    raw = newest(run.output).tensors["model"]  # not only their average
    assert all(torch.equal(raw[name], p) for name, p in before.encoder.named_parameters(prefix="encoder"))


def test_a_decoder_trained_alone_paints_the_latents_of_a_generator(make_run, stage1, tmp_path):
    from hieratok import DiT, load_pipeline
    from hieratok.generation.loading import make_pipeline
    from hieratok.models.autoencoder import Autoencoder

    old = load_tokenizer(stage1)
    frozen = make_run(f"init_from={stage1}", "train.freeze=encoder", "train.steps=8", output="sharper")
    moved = make_run(f"init_from={stage1}", "train.steps=8", output="moved")
    sharper, other = train_tokenizer(frozen), train_tokenizer(moved)
    assert load_tokenizer(sharper).config.latents_std == old.config.latents_std  # and normalised in the same way

    torch.manual_seed(0)
    model = DiT(sample_size=4, in_channels=4, out_channels=4, hidden_size=16, num_layers=1, num_heads=2, num_classes=3,
                latents_mean=old.config.latents_mean, latents_std=old.config.latents_std)  # fmt: skip
    make_pipeline(model, Autoencoder(old), "flow", ["a", "b", "c"]).save_pretrained(tmp_path / "pipeline")

    def drawn(decoder: Path | None) -> Tensor:
        pipe = load_pipeline(tmp_path / "pipeline", decoder)
        noise = torch.Generator().manual_seed(0)
        return pipe(class_labels=[0, 1], num_inference_steps=2, generator=noise, output_type="pt").images

    assert torch.equal(drawn(stage1), drawn(None)) and not torch.equal(drawn(sharper), drawn(None))
    with pytest.raises(ConfigError, match="another encoder"):
        drawn(other)
    command = ["sample", str(tmp_path / "pipeline"), "--decoder", str(sharper), "--per-class", "1", "--steps", "2"]
    assert main([*command, "--output", str(tmp_path / "drawn.png")]) == 0
    assert json.loads((tmp_path / "drawn.json").read_text())["decoder"] == str(sharper)


def test_a_frozen_encoder_needs_something_to_keep(make_run):
    with pytest.raises(ConfigError, match="init_from=RUN"):
        make_run("train.freeze=encoder")


def test_alignment_which_moves_latents_does_not_go_with_a_frozen_encoder(make_run):
    with pytest.raises(ConfigError, match="loss.alignment.weight=0"):
        make_run("loss.alignment.weight=0.1", "train.freeze=encoder", "init_from=anything")


# Settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.adversarial.scales=[3]", "the model's scales are"),
        ("discriminator.width=0", "discriminator.width"),
        ("discriminator.learning_rate=-1", "discriminator.learning_rate"),
        ("discriminator.kind=stylegun", "did you mean 'stylegan'"),
        ("train.freeze=decoder", "encoder"),
        ("train.freez=encoder", "did you mean 'freeze'"),
        ("loss.adversarial.start_step=40", "the run has 40 steps"),
        ("init_from=20251125", "init_from"),
    ],
)
def test_settings_that_do_not_fit_are_errors_that_name_the_field_before_anything_is_written(
    make_run, tmp_path, override, message
):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(make_run(*GAN, override))
    assert not (tmp_path / "run").exists()


def test_another_discriminator_is_another_run(make_run, monkeypatch):
    train_tokenizer(make_run(*GAN, "train.steps=2"))
    with pytest.raises(ConfigError, match="discriminator.width"):
        train_tokenizer(make_run(*GAN, "train.steps=4", "discriminator.width=0.25"), resume=True)


@pytest.mark.parametrize("recipe", ["stage2", "scaled-up", "small-64-stage2"])
def test_the_recipes_begin_from_a_run(recipe, stage1, monkeypatch):
    from hieratok.config import apply_overrides, load_recipe

    run = TokenizerRun.from_mapping(apply_overrides(load_recipe(recipe), [f"init_from={stage1}"]))
    assert run.loss.adversarial.weight == 0.6 and run.discriminator.weight_decay == 1e-4
    assert run.model["encoder_hidden_size"] == 32
    assert (run.loss.alignment.weight > 0) == (recipe == "scaled-up")


def test_table_8s_second_stage_is_the_recipe_stage2(stage1):
    from hieratok.config import apply_overrides, load_recipe

    run = TokenizerRun.from_mapping(apply_overrides(load_recipe("stage2"), [f"init_from={stage1}"]))
    train, judge = run.train, run.discriminator
    assert (train.epochs, train.batch_size, train.learning_rate, train.final_learning_rate) == (40, 256, 2e-4, 2e-6)
    assert (train.warmup_ratio, train.betas, train.weight_decay, train.optimizer) == (0.03, (0.9, 0.95), 0.05, "adamw")
    assert (judge.learning_rate, judge.final_learning_rate, judge.warmup_ratio) == (2e-4, 2e-6, 0.01)
    assert (judge.betas, judge.kind) == ((0.9, 0.95), "stylegan")


def test_the_dry_run_times_a_step_with_everything(make_run, stage1):
    from hieratok.training.plan import plan

    found = plan(make_run(*EVERYTHING, "loss.adversarial.start_step=5", f"init_from={stage1}", output="planned"))
    assert found.total_steps == 40 and found.seconds_per_step > 0
    assert "discriminator" in found.describe()
