"""The diffusion losses against the papers' formulas, computed anew in float64 with numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.polynomial.hermite_e import hermegauss
from scipy.stats import chisquare, kstest, norm

from hieratok.config import build
from hieratok.data.order import sample_seed
from hieratok.errors import ConfigError
from hieratok.generation.schedulers import make_scheduler
from hieratok.losses.diffusion import DiffusionLossConfig, GaussianDiffusion, make_diffusion_loss

CLASSES = 7
STEPS = [0, 1, 2, 10, 250, 500, 998, 999]

# DDPM, Section 2 and 4: beta_t rises linearly from 1e-4 to 0.02 over 1000 steps.
BETAS = np.array([1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)])
ALPHAS = 1 - BETAS
BARS = np.array([math.prod(ALPHAS[: i + 1]) for i in range(1000)])
BARS_BEFORE = np.array([1.0, *BARS[:-1]])


def arrays(count: int, seed: int = 0, shape=(2, 3, 3)) -> list[np.ndarray]:
    """Standard normal arrays `(len(STEPS), *shape)`."""
    return list(np.random.default_rng(seed).standard_normal((count, len(STEPS), *shape)))


def by_step(values: np.ndarray) -> np.ndarray:
    return values[STEPS].reshape(-1, 1, 1, 1)


def tensors(*values: np.ndarray, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.from_numpy(v).to(dtype) for v in values]


T = torch.tensor(STEPS)


def true_posterior(x0: np.ndarray, xt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) by Bayes' rule: the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0).

    At t = 0 the second is a point at x_0.
    """
    with np.errstate(divide="ignore"):
        precision_before = 1 / (1 - by_step(BARS_BEFORE))
    precision_step = by_step(ALPHAS) / by_step(BETAS)
    pull = by_step(np.sqrt(ALPHAS)) / by_step(BETAS) * xt
    with np.errstate(invalid="ignore"):
        mean = (pull + np.sqrt(by_step(BARS_BEFORE)) * precision_before * x0) / (precision_step + precision_before)
    variance = 1 / (precision_step + precision_before)
    first = (np.array(STEPS) == 0).reshape(-1, 1, 1, 1)
    return np.where(first, x0, mean), variance


def log_variance_bounds() -> tuple[np.ndarray, np.ndarray]:
    """log of beta-tilde and of beta (improved DDPM, Eq. 15); the former's at t = 0 is that of t = 1 (its footnote)."""
    tilde = [(1 - BARS_BEFORE[t]) / (1 - BARS[t]) * BETAS[t] for t in [max(t, 1) for t in STEPS]]
    return np.log(tilde).reshape(-1, 1, 1, 1), np.log(by_step(BETAS))


# The chain


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_noise_is_added_and_taken_away_as_the_paper_says(dtype, tolerance):
    x0, noise = arrays(2)
    xt = np.sqrt(by_step(BARS)) * x0 + np.sqrt(1 - by_step(BARS)) * noise
    chain = GaussianDiffusion()
    found = chain.add_noise(*tensors(x0, noise, dtype=dtype), T)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, xt, atol=tolerance)
    start = chain.predict_start(*tensors(xt, noise), T)
    np.testing.assert_allclose(start, x0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_posterior_is_that_of_bayes_rule(dtype, tolerance):
    x0, xt = arrays(2)
    mean, variance = true_posterior(x0, xt)
    found_mean, found_log_variance = GaussianDiffusion().posterior(*tensors(x0, xt, dtype=dtype), T)
    np.testing.assert_allclose(found_mean, mean, atol=tolerance)
    np.testing.assert_allclose(found_log_variance.exp()[1:], np.broadcast_to(variance, x0.shape)[1:], rtol=tolerance)


def test_the_learned_variance_lies_between_its_bounds_on_the_scale_of_logarithms():
    (fraction,) = arrays(1)
    low, high = log_variance_bounds()
    v = (fraction + 1) / 2
    found = GaussianDiffusion().log_variance(*tensors(fraction), T)
    np.testing.assert_allclose(found, v * high + (1 - v) * low, atol=1e-10)
    for value, bound in ((-1.0, low), (1.0, high)):
        at_bound = GaussianDiffusion().log_variance(torch.full((len(STEPS), 1, 1, 1), value, dtype=torch.float64), T)
        np.testing.assert_allclose(at_bound, bound, atol=1e-12)


def expected_bound(x0, xt, noise, fraction) -> np.ndarray:
    """The terms L_{t-1} and L_0 of DDPM's Eq. 5 in bits per number."""
    true_mean, true_variance = true_posterior(x0, xt)
    mean = (xt - by_step(BETAS) / np.sqrt(1 - by_step(BARS)) * noise) / np.sqrt(by_step(ALPHAS))  # DDPM Eq. 11
    low, high = log_variance_bounds()
    std = np.exp(((fraction + 1) / 2 * high + (1 - (fraction + 1) / 2) * low) / 2)
    with np.errstate(divide="ignore"):
        kl = np.log(std / np.sqrt(true_variance)) + (true_variance + (true_mean - mean) ** 2) / (2 * std**2) - 0.5
    above = np.where(x0 > 0.999, 1.0, norm.cdf(x0 + 1 / 255, mean, std))  # DDPM Eq. 13
    below = np.where(x0 < -0.999, 0.0, norm.cdf(x0 - 1 / 255, mean, std))
    with np.errstate(divide="ignore"):  # at steps that have no likelihood
        nats = np.where((np.array(STEPS) == 0).reshape(-1, 1, 1, 1), -np.log(above - below), kl)
    return nats.mean(axis=(1, 2, 3)) / np.log(2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_bound_is_the_divergence_of_the_posteriors_and_at_the_last_step_the_likelihood(dtype, tolerance):
    x0, noise, error, fraction = arrays(4, shape=(4, 5, 5))
    x0 = 0.6 * x0  # some numbers beyond -1 and 1, where the bins are open
    assert (x0[0] < -1).any() and (x0[0] > 1).any()
    xt = np.sqrt(by_step(BARS)) * x0 + np.sqrt(1 - by_step(BARS)) * noise
    answer, fraction = noise + 0.1 * error, np.tanh(fraction)
    expected = expected_bound(x0, xt, answer, fraction)
    found = GaussianDiffusion().bound(*tensors(x0, xt, answer, fraction, dtype=dtype), T)
    assert found.shape == (len(STEPS),)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_the_divergence_is_the_integral_that_defines_it():
    x0, noise, error = (values[..., :1, :1, :1] for values in arrays(3))
    xt = np.sqrt(by_step(BARS)) * x0 + np.sqrt(1 - by_step(BARS)) * noise
    fraction = np.full_like(x0, 0.5)
    found = GaussianDiffusion().bound(*tensors(x0, xt, noise + 0.2 * error, fraction), T)
    p_mean = (xt - by_step(BETAS) / np.sqrt(1 - by_step(BARS)) * (noise + 0.2 * error)) / np.sqrt(by_step(ALPHAS))
    q_mean, q_variance = true_posterior(x0, xt)
    low, high = log_variance_bounds()
    nodes, weights = hermegauss(12)  # exact for polynomials, which differences of a Gaussian's logarithms are
    for i in range(1, len(STEPS)):
        q = norm(q_mean[i].item(), math.sqrt(q_variance[i].item()))
        p = norm(p_mean[i].item(), math.exp((0.75 * high[i] + 0.25 * low[i]).item() / 2))
        x = q.mean() + q.std() * nodes
        integral = (weights * (q.logpdf(x) - p.logpdf(x))).sum() / weights.sum()
        assert found[i].item() == pytest.approx(integral / math.log(2), rel=1e-6)


def test_the_exact_noise_and_the_smallest_variance_leave_no_divergence():
    x0, noise = arrays(2)
    xt = np.sqrt(by_step(BARS)) * x0 + np.sqrt(1 - by_step(BARS)) * noise
    found = GaussianDiffusion().bound(*tensors(x0, xt, noise, np.full_like(x0, -1.0)), T)
    np.testing.assert_allclose(found[1:], 0, atol=1e-10)


def test_the_bound_stays_finite_far_from_the_data():
    x0, xt, noise, fraction = (100 * values for values in arrays(4))
    found = GaussianDiffusion().bound(*tensors(x0, xt, noise, np.tanh(fraction), dtype=torch.float32), T)
    assert torch.isfinite(found).all()


def test_diffusers_ddpm_walks_the_same_chain():
    chain, scheduler = GaussianDiffusion(), make_scheduler("ddpm", "ddpm", learns_variance=True)
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 2, 2)
    noisy, answer, fraction = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    fraction = fraction.tanh()
    for t in range(1000):
        at = torch.full((2,), t)
        mean, _ = chain.posterior(chain.predict_start(noisy, answer, at), noisy, at)
        log_variance = chain.log_variance(fraction, at)
        step = scheduler.step(
            torch.cat([answer, fraction], dim=1), torch.tensor(t), noisy, generator=torch.Generator().manual_seed(t)
        )
        if t == 0:  # the last step adds no noise
            torch.testing.assert_close(step.prev_sample, mean, atol=1e-4, rtol=1e-5)
            continue
        torch.testing.assert_close(scheduler._get_variance(t, fraction), log_variance, atol=1e-3, rtol=1e-4)
        drawn = randn_tensor(shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        expected = mean + torch.exp(0.5 * log_variance) * drawn
        torch.testing.assert_close(step.prev_sample, expected, atol=1e-4, rtol=1e-4)


# The losses


def generators(count: int) -> list[torch.Generator]:
    """With seeds as training gives them; the first draws of small seeds in a row are not independent."""
    return [torch.Generator().manual_seed(sample_seed(0, 0, i)) for i in range(count)]


def loss_of(objective: str = "ddpm", **settings):
    return make_diffusion_loss(DiffusionLossConfig(objective=objective, **settings), CLASSES)


class Watched:
    """A network that keeps what it was asked, and answers by a function of it."""

    def __init__(self, answer) -> None:
        self.answer = answer

    def __call__(self, noisy, times, labels):
        self.noisy, self.times, self.labels = noisy, times, labels
        return self.answer(noisy, times, labels)


def zeros(channels: int):
    return Watched(lambda noisy, *_: noisy.new_zeros(len(noisy), channels, *noisy.shape[2:]))


def test_ddpm_learns_the_noise_at_times_that_are_all_alike():
    latents = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(9))
    network = zeros(1)
    found = loss_of()(network, latents, torch.zeros(4000, dtype=torch.int64), generators(4000))
    times, bars = network.times, torch.from_numpy(BARS)[network.times].view(-1, 1, 1, 1)
    assert times.dtype == torch.int64 and times.min() >= 0 and times.max() <= 999
    assert chisquare(np.bincount(times.numpy() // 50, minlength=20)).pvalue > 0.01
    noise = (network.noisy.double() - bars.sqrt() * latents) / (1 - bars).sqrt()
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert found.total.item() == pytest.approx(noise.square().mean().item(), rel=1e-4)
    assert found.terms.keys() == {"mse"} and found.terms["mse"] == found.total


def test_ddpm_with_variance_adds_the_bound_of_the_step():
    latents, labels = torch.randn(len(STEPS), 3, 2, 2), torch.zeros(len(STEPS), dtype=torch.int64)
    answers = 0.3 * torch.randn(len(STEPS), 6, 2, 2)
    network = Watched(lambda *_: answers)
    found = loss_of()(network, latents, labels, generators(len(STEPS)))
    bars = torch.from_numpy(BARS)[network.times].view(-1, 1, 1, 1)
    noise = (network.noisy.double() - bars.sqrt() * latents) / (1 - bars).sqrt()
    mse = (answers[:, :3] - noise).square().mean()
    vlb = GaussianDiffusion().bound(
        latents.double(), network.noisy.double(), answers[:, :3].double(), answers[:, 3:].double(), network.times
    )
    assert found.terms["mse"].item() == pytest.approx(mse.item(), rel=1e-4)
    assert found.terms["vlb"].item() == pytest.approx(vlb.mean().item(), rel=1e-3)
    assert found.total.item() == pytest.approx((found.terms["mse"] + found.terms["vlb"]).item(), rel=1e-6)


def test_the_bound_teaches_the_variance_and_not_the_mean():
    latents, labels = torch.randn(6, 3, 2, 2), torch.zeros(6, dtype=torch.int64)
    both = torch.randn(6, 6, 2, 2, requires_grad=True)
    alone = both[:, :3].detach().clone().requires_grad_()
    loss_of()(lambda *_: both, latents, labels, generators(6)).total.backward()
    loss_of()(lambda *_: alone, latents, labels, generators(6)).total.backward()  # the same draws, no bound
    assert torch.equal(both.grad[:, :3], alone.grad)
    assert (both.grad[:, 3:] != 0).any(dim=1).all()


def test_a_flow_learns_the_velocity_along_a_straight_path():
    latents, labels = torch.randn(2000, 1, 2, 2), torch.zeros(2000, dtype=torch.int64)
    network = zeros(1)
    found = loss_of("flow")(network, latents, labels, generators(2000))
    share = (network.times.double() / 1000).view(-1, 1, 1, 1)
    noise = (network.noisy.double() - (1 - share) * latents) / share
    usable = share.flatten() > 0.02  # below it the noise cannot be told from x_t in float32
    assert kstest(noise[usable].flatten().numpy(), "norm").pvalue > 0.01
    assert found.total.item() == pytest.approx((noise - latents).square().mean().item(), rel=1e-3)
    assert found.terms.keys() == {"mse"}

    def exact(noisy, times, labels):  # v = (x_t - x_0) / t
        return (noisy - latents) / (times / 1000).view(-1, 1, 1, 1)

    assert loss_of("flow")(exact, latents, labels, generators(2000)).total < 1e-6


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.5)])
def test_the_times_of_a_flow_are_logit_normal(mean, std):
    network, count = zeros(1), 4000
    loss = loss_of("flow", time_mean=mean, time_std=std)
    loss(network, torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), generators(count))
    times = network.times.double().numpy() / 1000
    assert times.min() > 0 and times.max() < 1
    logits = np.log(times / (1 - times))
    assert logits.mean() == pytest.approx(mean, abs=0.05) and logits.std() == pytest.approx(std, rel=0.05)
    assert kstest(logits, "norm", args=(mean, std)).pvalue > 0.01


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
@pytest.mark.parametrize(("rate", "spread"), [(0.0, 0.0), (0.1, 0.015), (1.0, 0.0)])
def test_classes_are_dropped_as_often_as_the_recipe_says(objective, rate, spread):
    network, count = zeros(1), 4000
    labels = torch.arange(count) % CLASSES
    loss_of(objective, class_dropout=rate)(network, torch.zeros(count, 1, 1, 1), labels, generators(count))
    dropped = network.labels != labels
    assert (network.labels[dropped] == CLASSES).all() and network.labels.dtype == torch.int64
    assert dropped.double().mean().item() == pytest.approx(rate, abs=spread)


@pytest.mark.parametrize(("objective", "channels"), [("ddpm", 6), ("ddpm", 3), ("flow", 3)])
def test_the_loss_of_a_sample_does_not_depend_on_the_batch_around_it(objective, channels):
    latents, labels = torch.randn(3, 3, 2, 2), torch.tensor([0, 3, 6])
    loss = loss_of(objective, class_dropout=0.5)

    def network(noisy, times, labels):
        gain = torch.cos(times / 300 + labels).view(-1, 1, 1, 1)
        return (gain * noisy).repeat(1, channels // 3, 1, 1).tanh()

    together = loss(network, latents, labels, generators(3)).total.item()
    alone = [
        loss(network, latents[i : i + 1], labels[i : i + 1], generators(3)[i : i + 1]).total.item() for i in range(3)
    ]
    assert together == pytest.approx(sum(alone) / 3, rel=1e-5)
    assert len(set(alone)) == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("class_dropout", 1.5, "loss.class_dropout is 1.5"),
        ("time_std", 0.0, "loss.time_std is 0.0"),
        ("objective", "dpm", "did you mean 'ddpm'"),
    ],
)
def test_settings_out_of_their_ranges_are_refused_by_name(field, value, message):
    with pytest.raises(ConfigError, match=message):
        build(DiffusionLossConfig, {field: value}, "loss")
