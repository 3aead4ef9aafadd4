"""The adversarial losses and their penalties against known answers, and what a discriminator is shown."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hieratok.config import build
from hieratok.errors import ConfigError
from hieratok.losses.adversarial import (
    AdversarialConfig,
    LeCamAverages,
    accuracy,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)
from hieratok.losses.augmentation import CUTOUT_SIDE, MAX_SHIFT, POLICIES, augment
from hieratok.losses.discriminators import build_discriminator

REAL = torch.tensor([[2.0, 0.5], [-1.0, 0.0]])
FAKE = torch.tensor([[-3.0, -0.5], [1.0, 0.0]])


def logits(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


class TestLosses:
    def test_hinge(self):
        # relu(1 - real) is 0, 0.5, 2, 1 and relu(1 + fake) is 0, 0.5, 2, 1.
        assert discriminator_loss("hinge", REAL, FAKE).item() == pytest.approx(0.5 * (3.5 / 4 + 3.5 / 4))
        assert discriminator_loss("hinge", torch.zeros(2, 1), torch.zeros(2, 1)) == 1
        assert generator_loss("hinge", FAKE).item() == pytest.approx(2.5 / 4)

    def test_non_saturating_is_the_logistic_loss_of_numpy(self):
        real, fake = logits(2, 3, 5)
        expected = np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean()
        actual = discriminator_loss("non_saturating", torch.tensor(real), torch.tensor(fake))
        assert actual.item() == pytest.approx(expected)
        assert generator_loss("non_saturating", torch.tensor(fake)).item() == pytest.approx(
            np.log1p(np.exp(-fake)).mean()
        )
        assert discriminator_loss("non_saturating", torch.zeros(2, 1), torch.zeros(2, 1)).item() == pytest.approx(
            2 * math.log(2)
        )

    @pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
    def test_discriminator_and_tokenizer_pull_the_logits_of_reconstructions_apart(self, kind):
        real, fake = torch.zeros(3, 1, requires_grad=True), torch.zeros(3, 1, requires_grad=True)
        on_real, on_fake = torch.autograd.grad(discriminator_loss(kind, real, fake), (real, fake))
        (to_tokenizer,) = torch.autograd.grad(generator_loss(kind, fake), fake)
        assert (on_real < 0).all() and (on_fake > 0).all() and (to_tokenizer < 0).all()

    def test_the_tokenizer_still_learns_where_the_discriminator_is_sure(self):
        fake = torch.full((1, 1), -30.0, requires_grad=True)
        for kind in ("hinge", "non_saturating"):
            (gradient,) = torch.autograd.grad(generator_loss(kind, fake), fake)
            assert gradient.item() == pytest.approx(-1)

    def test_accuracy_is_the_share_of_logits_on_their_side(self):
        # Two of four real ones are above 0, two of four are below; a logit of 0 is on neither side.
        assert accuracy(REAL, FAKE).item() == 0.5
        assert accuracy(torch.ones(3, 2), -torch.ones(5, 2)) == 1
        assert accuracy(-torch.ones(3, 2), -torch.ones(1, 2)) == 0.5


class TestLeCam:
    def test_the_penalty_is_that_of_numpy(self):
        real, fake = logits(2, 4, 3)
        expected = np.mean(np.maximum(real + 0.25, 0) ** 2) + np.mean(np.maximum(0.5 - fake, 0) ** 2)
        average = torch.tensor([0.5, -0.25], dtype=torch.float64)
        actual = lecam_penalty(torch.tensor(real), torch.tensor(fake), average[0], average[1])
        assert actual.item() == pytest.approx(expected)

    def test_it_draws_sure_logits_back(self):
        real, fake = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[-2.0]], requires_grad=True)
        penalty = lecam_penalty(real, fake, torch.tensor(1.0), torch.tensor(-1.0))
        assert penalty.item() == 18
        on_real, on_fake = torch.autograd.grad(penalty, (real, fake))
        assert on_real.item() == 6 and on_fake.item() == -6

    def test_the_averages_are_moving_means_from_zero_that_are_saved(self):
        averages = LeCamAverages(decay=0.9)
        for real, fake in ((1.0, -2.0), (3.0, 0.0)):
            averages.update(torch.tensor(real), torch.tensor(fake))
        assert averages.real.item() == pytest.approx(0.9 * 0.1 * 1 + 0.1 * 3)
        assert averages.fake.item() == pytest.approx(0.9 * 0.1 * -2)
        again = LeCamAverages()
        again.load_state_dict(averages.state_dict())
        assert torch.equal(again.real, averages.real) and torch.equal(again.fake, averages.fake)

    def test_an_update_between_the_penalty_and_its_gradient_changes_nothing(self):
        averages = LeCamAverages(decay=0.5)
        real, fake = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[-2.0]], requires_grad=True)
        penalty = lecam_penalty(real, fake, averages.real, averages.fake)
        averages.update(real.mean(), fake.mean())
        penalty.backward()
        assert real.grad.item() == 4 and averages.real.item() == 1


class TestR1:
    def test_of_a_linear_discriminator_it_is_half_the_squared_norm_of_its_weights(self):
        weight = torch.randn(3 * 4 * 4, dtype=torch.float64)
        images = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        penalty = r1_penalty(images.flatten(1) @ weight[:, None], images)
        assert penalty.item() == pytest.approx(0.5 * weight.square().sum().item())

    def test_it_does_not_depend_on_the_number_of_equal_logits(self):
        weight = torch.randn(3 * 4 * 4, dtype=torch.float64)
        images = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        penalty = r1_penalty(images.flatten(1) @ weight[:, None].expand(-1, 7), images)
        assert penalty.item() == pytest.approx(0.5 * weight.square().sum().item())

    def test_of_a_quadratic_discriminator_it_and_its_gradient_are_known(self):
        # D(x) = a |x|^2 / 2 has the gradient a x, the penalty a^2 |x|^2 / 2 and its derivative a |x|^2.
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        images = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        penalty = r1_penalty(scale * images.square().sum(dim=(1, 2, 3))[:, None] / 2, images)
        squared = images.detach().square().sum(dim=(1, 2, 3)).mean().item()
        assert penalty.item() == pytest.approx(9 * squared / 2)
        (gradient,) = torch.autograd.grad(penalty, scale)
        assert gradient.item() == pytest.approx(3 * squared)

    @pytest.mark.parametrize("kind", ["stylegan", "patchgan", "dino"])
    def test_every_discriminator_can_be_penalised(self, kind):
        torch.manual_seed(0)
        network = build_discriminator(kind, 32, width=1 / 16)
        images = torch.randn(4, 3, 32, 32, requires_grad=True)
        r1_penalty(network(images), images).backward()
        weights = [p for p in network.parameters() if p.dim() > 1]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in weights)
        assert sum(p.grad.norm() for p in weights) > 0


class TestAdaptiveWeight:
    @pytest.fixture
    def decoder(self):
        """A decoder in double precision, its last layer, and two losses that can be computed again."""
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double()
        latents, targets = torch.randn(5, 3).double(), torch.randn(5, 2).double()
        return (
            decoder[2].weight,
            lambda: (decoder(latents) - targets).abs().mean(),
            lambda: decoder(latents).sin().mean() * 0.01,
        )

    @staticmethod
    def norm_by_differences(loss, parameter, step=1e-6) -> float:
        slopes = []
        with torch.no_grad():
            for i in range(parameter.numel()):
                place = parameter.view(-1)
                before = place[i].item()
                place[i] = before + step
                above = loss().item()
                place[i] = before - step
                below = loss().item()
                place[i] = before
                slopes.append((above - below) / (2 * step))
        return float(np.linalg.norm(slopes))

    def test_it_is_the_ratio_of_the_gradients_norms_by_finite_differences(self, decoder):
        parameter, reconstruction, adversarial = decoder
        expected = self.norm_by_differences(reconstruction, parameter) / (
            self.norm_by_differences(adversarial, parameter) + 1e-4
        )
        weight = adaptive_weight(reconstruction(), adversarial(), parameter, 1e4)
        assert weight.item() == pytest.approx(expected, rel=1e-6) and not weight.requires_grad

    def test_weighed_by_it_a_loss_pulls_as_hard_as_the_other(self, decoder):
        parameter, reconstruction, adversarial = decoder
        loss, other = reconstruction(), adversarial()
        weight = adaptive_weight(loss, other, parameter, 1e4, eps=0)
        pulls = [torch.autograd.grad(x, parameter)[0].norm().item() for x in (loss, weight * other)]  # graphs are kept
        assert pulls[0] == pytest.approx(pulls[1])

    def test_it_is_cut_at_the_maximum_and_finite_where_a_loss_is_flat(self, decoder):
        parameter, reconstruction, _ = decoder
        assert adaptive_weight(reconstruction(), reconstruction() * 1e-3, parameter, 2.0).item() == 2
        flat = (parameter * 0).sum()
        expected = self.norm_by_differences(reconstruction, parameter) / 1e-4
        assert adaptive_weight(reconstruction(), flat, parameter, 1e8).item() == pytest.approx(expected, rel=1e-6)

    def test_gradients_are_averaged_before_their_norms_are_taken(self):
        parameter = torch.tensor([3.0, 0.0], requires_grad=True)
        others = iter([torch.tensor([0.0, 8.0]), torch.tensor([-1.0, 0.0])])  # of another process

        def reduce(gradient: torch.Tensor) -> torch.Tensor:
            return (gradient + next(others)) / 2

        # Gradients (6, 0) and (3, 0) become (3, 4) and (1, 0).
        weight = adaptive_weight(parameter.square().sum(), 3 * parameter.sum() - 3 * parameter[1], parameter, 1e4,
                                 eps=0, reduce=reduce)  # fmt: skip
        assert weight.item() == pytest.approx(5)


class TestConfig:
    def test_the_weight_rises_over_the_ramp_and_is_zero_before_it(self):
        config = AdversarialConfig(weight=0.6, start_step=10, ramp_steps=4)
        assert [config.weight_at(step) for step in (0, 9, 10, 11, 12, 13, 14, 1000)] == pytest.approx(
            [0, 0, 0.15, 0.3, 0.45, 0.6, 0.6, 0.6]
        )
        assert [AdversarialConfig(weight=0.6, start_step=2).weight_at(step) for step in (1, 2, 3)] == [0, 0.6, 0.6]

    def test_the_discriminator_learns_from_its_own_step_on_or_from_that_of_the_tokenizer(self):
        early = AdversarialConfig(weight=0.6, start_step=10, discriminator_start_step=4)
        assert [early.learns_at(step) for step in (3, 4, 10)] == [False, True, True]
        together = AdversarialConfig(weight=0.6, start_step=10)
        assert [together.learns_at(step) for step in (4, 9, 10)] == [False, False, True]

    def test_at_weight_zero_nothing_happens(self):
        config = AdversarialConfig()
        assert config.weight_at(100) == 0 and not config.learns_at(100)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("weight", -1.0), ("weight", math.inf), ("weight", math.nan), ("loss", "hing"), ("adaptive_max", 0.0),
            ("scales", []), ("scales", [4, 4]), ("scales", [0]), ("sharing", "share"), ("start_step", -1),
            ("discriminator_start_step", -1), ("discriminator_start_step", 1), ("ramp_steps", -1),
            ("update", "alternating"), ("lecam", -0.1), ("lecam_decay", 1.0), ("r1", math.inf), ("r1_every", 0),
            ("augment", ["colour"]), ("augment_probability", 1.5),
        ],
    )  # fmt: skip
    def test_a_value_that_makes_no_sense_is_refused_by_the_name_of_its_field(self, field, value):
        with pytest.raises(ConfigError, match=rf"loss\.adversarial\.{field}"):
            AdversarialConfig(**{field: value})

    def test_a_misspelt_policy_is_answered_with_the_nearest_one(self):
        with pytest.raises(ConfigError, match=r"loss.adversarial.augment\[1\] is 'cut_out'; did you mean 'cutout'"):
            AdversarialConfig(augment=["color", "cut_out"])

    def test_a_recipe_gives_every_field(self):
        values = {"weight": "6e-1", "scales": [4, 8], "augment": ["color"], "update": "alternate", "r1": 1}
        config = build(AdversarialConfig, values, "loss.adversarial")
        assert config == AdversarialConfig(weight=0.6, scales=[4, 8], augment=["color"], update="alternate", r1=1.0)


class TestAugmentation:
    @staticmethod
    def seeded(seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    @staticmethod
    def images(batch: int = 16, side: int = 32) -> torch.Tensor:
        return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def test_it_is_a_function_of_the_generators_state(self):
        torch.manual_seed(5)
        first, generator = self.seeded(), self.seeded()
        once = augment(self.images(), POLICIES, first)
        torch.manual_seed(6)  # the global one has no part in it
        assert torch.equal(augment(self.images(), POLICIES, generator), once)
        state = generator.get_state()
        second = augment(self.images(), POLICIES, generator)
        assert not torch.equal(second, once)
        generator.set_state(state)
        assert torch.equal(augment(self.images(), POLICIES, generator), second)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_policy_keeps_the_shape_changes_each_sample_in_its_own_way_and_lets_gradients_through(self, policy):
        image = self.images(1)
        images = image.repeat(16, 1, 1, 1).requires_grad_()
        changed = augment(images, [policy], self.seeded())
        assert changed.shape == images.shape and changed.dtype == images.dtype
        assert len({tuple(sample.flatten().tolist()) for sample in changed}) > 12
        changed.sum().backward()
        assert (images.grad.flatten(1).norm(dim=1) > 0).all()

    @pytest.mark.parametrize("policy", POLICIES)
    def test_at_probability_zero_it_is_the_identity_and_at_a_half_about_half_are_changed(self, policy):
        images = self.images(200, side=16)
        assert torch.equal(augment(images, [policy], self.seeded(), probability=0.0), images)
        some = augment(images, [policy], self.seeded(), probability=0.5)
        changed = (some != images).flatten(1).any(dim=1).float().mean().item()
        assert 0.35 < changed < 0.65
        assert torch.equal(augment(images, [], self.seeded()), images)

    def test_color_scales_and_moves_an_image_within_its_bounds(self):
        grey = torch.full((64, 3, 8, 8), 0.25)
        moved = augment(grey, ["color"], self.seeded()) - grey  # of one colour: brightness alone can change it
        assert (moved - moved[:, :1, :1, :1]).abs().max() < 1e-5
        assert moved.abs().max() <= 0.5 and moved.min() < -0.3 and moved.max() > 0.3

        images = self.images(64)
        changed = augment(images, ["color"], self.seeded())
        luminance, before = changed.mean(dim=1), images.mean(dim=1)
        contrast = luminance.flatten(1).std(dim=1) / before.flatten(1).std(dim=1)
        assert 0.5 <= contrast.min() < 0.7 and 1.3 < contrast.max() <= 1.5 + 1e-5
        saturation = (changed.std(dim=1) / images.std(dim=1)).mean(dim=(1, 2)) / contrast
        assert 0 <= saturation.min() < 0.3 and 1.7 < saturation.max() <= 2 + 1e-3
        drawn = torch.stack([changed.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3)), contrast, saturation])
        assert (drawn.corrcoef() - torch.eye(3)).abs().max() < 0.4  # each has its own number

    def test_translation_moves_whole_pixels_up_to_an_eighth_and_fills_with_zeros(self):
        images = self.images(64)
        furthest = int(32 * MAX_SHIFT)
        moves = set()
        for image, moved in zip(images, augment(images, ["translation"], self.seeded()), strict=True):
            found = []
            for down in range(-furthest, furthest + 1):
                for right in range(-furthest, furthest + 1):
                    expected = torch.zeros_like(image)
                    rows, columns = slice(max(down, 0), 32 + min(down, 0)), slice(max(right, 0), 32 + min(right, 0))
                    expected[:, rows, columns] = torch.roll(image, (down, right), dims=(1, 2))[:, rows, columns]
                    if torch.equal(expected, moved):
                        found.append((down, right))
            assert len(found) == 1
            moves |= set(found)
        assert {down for down, _ in moves} == {right for _, right in moves} == set(range(-furthest, furthest + 1))

    def test_cutout_empties_one_square_and_leaves_the_rest(self):
        images = self.images(64) + 2  # nowhere 0
        changed = augment(images, ["cutout"], self.seeded())
        length, whole = round(32 * CUTOUT_SIDE), 0
        for image, holed in zip(images, changed, strict=True):
            hole = (holed == 0).all(dim=0)
            rows, columns = hole.any(dim=1).nonzero(), hole.any(dim=0).nonzero()
            height, width = (int(x.max() - x.min() + 1) for x in (rows, columns))
            assert hole.sum() == height * width and height <= length and width <= length
            assert torch.equal(holed[:, ~hole], image[:, ~hole])
            whole += height == width == length
        assert whole > 32

    def test_an_unknown_policy_is_refused(self):
        with pytest.raises(ConfigError, match="'flip'; valid: color, translation, cutout"):
            augment(self.images(1), ["flip"], self.seeded())
