"""How well a tokenizer reconstructs images, at the finest scale and at every coarser one.

Paper: Sec. 4 (rFID, PSNR, SSIM and LPIPS on the validation set). The protocol of each figure is in
`docs/evaluation.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from .. import __version__
from ..config import suggest
from ..data.decode import to_float, to_uint8
from ..data.frame import Frame
from ..data.loader import Batch, eval_loader
from ..data.source import ImageSource, spread
from ..errors import ConfigError, NonFiniteError
from ..losses.perceptual import LPIPS, LpipsNetwork
from ..losses.reconstruction import resize_images
from ..models.tokenizer import HieraTok
from . import pairwise
from .features import FeatureNetwork, check_side, figure_key, load_features
from .frechet import GaussianSums, frechet_distance, small_sample_warnings
from .passes import add_up, add_up_gaussian, check_evaluated, rank_of, walk
from .protocol import Protocol, resize_rule
from .tables import align, label, number, save_json

if TYPE_CHECKING:
    from accelerate import Accelerator

Posterior = Literal["mode", "sample"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class ReconstructionResult:
    """The figures of one evaluation and what they depend on.

    Attributes:
        metrics: of the finest scale. `rfid_mini` (`rfid` when the network is Inception), `real_halves_mini`, `psnr`,
            `ssim`, `lpips_mini`, `l1`; a stand-in network's name is part of the key. A metric that the size does not
            permit is absent.
        scales: the same, less the Frechet distances, per coarser scale, under the side of its token map.
        counts: how many images stand on each side of the Frechet distances, by the keys of `metrics`.
        protocol: everything else that the figures depend on.
        warnings: what a reader of the figures must know.
    """

    metrics: dict[str, float]
    scales: dict[int, dict[str, float]]
    counts: dict[str, tuple[int, int]]
    protocol: Protocol
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping; the sides of the scales become strings."""
        return {
            "metrics": dict(self.metrics),
            "scales": {str(side): dict(metrics) for side, metrics in self.scales.items()},
            "counts": {key: list(counts) for key, counts in self.counts.items()},
            "protocol": self.protocol.to_dict(),
            "warnings": list(self.warnings),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON; whoever reads the file meets the old one or the new one, never a part."""
        save_json(path, self.to_dict())

    def table(self) -> str:
        """The figures, aligned for a terminal, with protocol and warnings under them."""
        pixelwise = [key for key in self.metrics if key not in self.counts]
        rows = [["scale", *(label(key) for key in pixelwise)]]
        for side, metrics in {**self.scales, self.protocol.grid_side: self.metrics}.items():
            name = f"{side} ({side * self.protocol.patch_size} px)"
            rows.append([name, *(number(metrics.get(key)) for key in pixelwise)])
        sets = [[label(key), number(self.metrics[key]), f"N = {a:,} and {b:,}"] for key, (a, b) in self.counts.items()]
        parts = [*([align(sets)] if sets else []), align(rows), self.protocol.describe()]
        parts += [f"warning: {warning}" for warning in self.warnings]
        return "\n\n".join(parts)


def evaluate_reconstruction(
    model: HieraTok,
    source: ImageSource,
    *,
    num_images: int | None = None,
    batch_size: int = 64,
    features: str | Callable[[Tensor], Tensor] = "mini",
    feature_weights: str | Path | None = None,
    lpips: LpipsNetwork = "mini",
    lpips_weights: str | Path | None = None,
    posterior: Posterior = "mode",
    num_workers: int = 0,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    progress: bool = True,
    accelerator: Accelerator | None = None,
    frame: Frame | None = None,
    max_bad_fraction: float = 0.01,
) -> ReconstructionResult:
    """Reconstruct `num_images` images, spread over a source, and compare with the originals.

    Every reconstruction is rounded to uint8 before any metric, as if it had been saved. Coarser scales are compared
    with the original averaged down to their size, rounded likewise. Figures do not depend on `batch_size`,
    `num_workers` or the number of processes beyond the last digits of floating point.

    Args:
        model: the tokenizer; it comes back in the mode (training or evaluation) in which it came.
        source: the images, which are both reconstructed and the reference.
        num_images: None, or more than there are, is all of them.
        batch_size: images at once, per process.
        features: feature network of the Frechet distances, see `load_features`.
        feature_weights: local file of that network.
        lpips: network of LPIPS, "mini" or "vgg16".
        lpips_weights: local file of that network.
        posterior: decode its "mode", or a "sample" whose noise depends on `seed` and the image only.
        num_workers: processes that decode images.
        device: where to compute; None is the accelerator's, or where the model is. The model is moved there.
        precision: of the model: "fp32", or "bf16" by autocast. Metrics are always fp32 or better.
        seed: of the posterior's samples.
        progress: show a bar (on the main process).
        accelerator: of a run with several processes; each takes every n-th image and all return the same result.
        frame: how images are cropped; None is the centre.
        max_bad_fraction: the part of the images that may be bad; they are left out.

    Raises:
        ConfigError: a size that is not above 0, an unknown network, posterior or precision,
            or a frame of another size than the model's.
        DataError: too many bad images, or no good one.
        HieratokError: another process of the run failed.
        ProtocolError: images too small for the feature network.
        NonFiniteError: the model paints NaN or infinite pixels.
    """
    _check_choice("posterior", posterior, get_args(Posterior))
    _check_choice("precision", precision, get_args(Precision))
    for name, value in {"num_images": num_images, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    side = int(model.config.image_size)
    frame = frame or Frame(side)
    if frame.image_size != side:
        raise ConfigError(f"frame.image_size is {frame.image_size}, the model's {side}")
    if device is None:
        device = accelerator.device if accelerator is not None else next(model.parameters()).device
    device = torch.device(device)
    comparison = _Comparison(
        load_features(features, feature_weights, device),
        LPIPS(lpips, lpips_weights).to(device),  # type: ignore[arg-type]
        scales=list(model.layout.sides),
        image_size=side,
    )
    wanted = len(source) if num_images is None else num_images
    source = spread(source, num_images)  # sets are often sorted by class
    rank, world_size = rank_of(accelerator)
    batches = eval_loader(
        source, side, batch_size, frame=frame, num_workers=num_workers, rank=rank, world_size=world_size,
        seed=seed, max_bad_fraction=max_bad_fraction,
    )  # fmt: skip

    def step(batch: Batch) -> None:
        images = batch.images.to(device)
        comparison.update(images, reconstruct(model, images, batch, posterior, precision), batch.indices)

    was_training = model.training
    model.to(device).eval()  # type: ignore[arg-type]
    try:
        walk(batches, step, total=len(source), title="reconstructing", progress=progress, accelerator=accelerator)
    finally:
        model.train(was_training)
    if accelerator is not None and world_size > 1:
        comparison.reduce(accelerator)
    check_evaluated(source, comparison.num_images, max_bad_fraction)

    protocol = Protocol(
        features=comparison.features.name,
        features_sha256=comparison.features.sha256,
        lpips=comparison.lpips.name,
        lpips_sha256=comparison.lpips.sha256,
        image_size=side,
        patch_size=int(model.config.patch_size),
        resize=resize_rule(frame),
        num_images=comparison.num_images,
        dataset=source.name,
        dataset_digest=source.digest,
        hieratok_version=__version__,
        posterior=posterior,
        seed=seed,
        precision=precision,
    )
    return comparison.result(protocol, wanted)


def reconstruct(
    model: HieraTok, images: Tensor, batch: Batch, posterior: Posterior = "mode", precision: Precision = "fp32"
) -> tuple[Tensor, ...]:
    """The uint8 image of every scale, coarse to fine, of uint8 images `(B, 3, H, W)` on the model's device.

    A sample's noise comes from its own generator, seeded by `batch.seeds`, so it does not depend on its neighbours.

    Raises:
        NonFiniteError: a pixel is NaN or infinite; rounding would hide it.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = model(to_float(images), sample_posterior=posterior == "sample", generator=generators)
    for image in output.scales:
        if not torch.isfinite(image).all():
            raise NonFiniteError(
                f"the model paints NaN or infinite pixels at {image.shape[-1]} px, in a batch with {batch.keys[0]}; "
                f"use precision=fp32 or an earlier checkpoint"
            )
    return tuple(to_uint8(image) for image in output.scales)


class _Comparison:
    """The running sums of all metrics, and what they come to."""

    def __init__(self, features: FeatureNetwork, lpips: LPIPS, scales: list[int], image_size: int) -> None:
        check_side(features, image_size)
        self.features, self.lpips, self.scales = features, lpips, scales
        device = next(lpips.parameters()).device
        sums_on = "cpu" if device.type == "mps" else device  # Apple's GPUs have no float64
        self.real = [GaussianSums(features.dim, sums_on) for _ in ("even positions", "odd positions")]
        self.fake = GaussianSums(features.dim, sums_on)
        names = ["psnr", "ssim", f"lpips_{lpips.name}", "l1"]
        self.means = {side: {name: pairwise.Mean() for name in names} for side in scales}

    @property
    def num_images(self) -> int:
        return self.fake.count

    def update(self, images: Tensor, reconstructions: tuple[Tensor, ...], positions: Tensor) -> None:
        """Add uint8 images `(B, 3, H, W)`, their reconstructions coarse to fine, and their positions `(B,)`."""
        real = self.features(images)
        positions = positions.to(real.device)
        for parity, half in enumerate(self.real):
            half.update(real[positions % 2 == parity])
        self.fake.update(self.features(reconstructions[-1]))
        for side, image in zip(self.scales, reconstructions, strict=True):
            pixels = image.shape[-1]
            # In grey levels, where the many means that end in .5 are exact and round alike on every device.
            target = resize_images(images.float(), pixels).round().to(torch.uint8)
            for name, values in self._compare(image, target).items():
                self.means[side][name].update(values)

    def _compare(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        values = {"psnr": pairwise.psnr(image, target), "l1": pairwise.l1(image, target)}
        similarity = pairwise.ssim(image, target)
        if similarity is not None:
            values["ssim"] = similarity
        if image.shape[-1] >= self.lpips.min_side:
            values[f"lpips_{self.lpips.name}"] = self.lpips(to_float(image), to_float(target))
        return values

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes."""
        for gaussian in (*self.real, self.fake):
            add_up_gaussian(accelerator, gaussian)
        for means in self.means.values():
            for mean in means.values():
                mean.sums = add_up(accelerator, mean.sums)

    def result(self, protocol: Protocol, wanted: int) -> ReconstructionResult:
        even, odd = self.real
        metrics: dict[str, float] = {}
        counts: dict[str, tuple[int, int]] = {}
        if min(even.count, odd.count) >= 2:
            rfid, halves = (figure_key(figure, self.features.name) for figure in ("rfid", "real_halves"))
            counts = {rfid: (self.num_images, self.num_images), halves: (even.count, odd.count)}
            between_halves = frechet_distance(even, odd)
            even.merge(odd)
            metrics = {rfid: frechet_distance(even, self.fake), halves: between_halves}
        figures = {
            side: {name: mean.value for name, mean in means.items() if mean.value is not None}
            for side, means in self.means.items()
        }
        finest = figures.pop(self.scales[-1])
        return ReconstructionResult({**metrics, **finest}, figures, counts, protocol, self._warnings(wanted))

    def _warnings(self, wanted: int) -> list[str]:
        n = self.num_images
        warnings = []
        if n < wanted:
            warnings.append(f"{wanted:,} images were asked for and {n:,} could be evaluated")
        if min(half.count for half in self.real) < 2:
            return [*warnings, f"{n:,} images are too few for Frechet distances, which are left out; give 4 or more"]
        return warnings + small_sample_warnings(n, {self.features.name: self.features.dim})


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} '{value}'{suggest(str(value), choices)}")
