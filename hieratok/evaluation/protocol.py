"""Everything that the values of an evaluation depend on, kept and printed with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..data.frame import Frame

SAME_IMAGES = "the same images that were reconstructed"
RESIZE_RULES = {
    "center": "shorter side resized by Lanczos, centre crop",
    "random": "shorter side resized by Lanczos, centre crop",  # random in training only
    "squash": "both sides resized by Lanczos",
}


def resize_rule(frame: Frame) -> str:
    """How an evaluation brings images to the size of a frame."""
    return f"{RESIZE_RULES[frame.crop]}, alpha over {frame.background}"


@dataclass(frozen=True)
class Protocol:
    """Figures of two evaluations may be compared where all of this but the model agrees.

    Attributes:
        features: name of the feature network of Frechet distances.
        features_sha256: hash of its weights, or "unversioned".
        lpips: name of the network of LPIPS.
        lpips_sha256: hash of its weights.
        image_size: side of the images in pixels.
        patch_size: image side of a scale is its side times this.
        resize: how images were brought to that side.
        num_images: how many were reconstructed.
        reference: what the reconstructions' features are compared with.
        posterior: "mode" or "sample".
        seed: of the posterior's samples (of no effect on the mode).
        precision: of the model, "fp32" or "bf16"; metrics are always taken in fp32 or better.
        rounding: what was done to reconstructions before any metric.
        dataset: name of the data set.
        dataset_digest: hash over its keys and sizes.
        hieratok_version: of this package.
    """

    features: str
    features_sha256: str
    lpips: str
    lpips_sha256: str
    image_size: int
    patch_size: int
    resize: str
    num_images: int
    dataset: str
    dataset_digest: str
    hieratok_version: str
    posterior: str = "mode"
    seed: int = 0
    precision: str = "fp32"
    reference: str = SAME_IMAGES
    rounding: str = "uint8"

    @property
    def grid_side(self) -> int:
        """Side of the latent and of the finest scale's token map."""
        return self.image_size // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)

    def describe(self) -> str:
        """Two lines for people."""
        posterior = f"posterior sample, seed {self.seed}" if self.posterior == "sample" else "posterior mode"
        return (
            f"{self.num_images:,} images of {self.dataset} ({self.dataset_digest[:8]}), {self.image_size} px, "
            f"{self.resize}; reference: {self.reference}\n"
            f"{posterior}, {self.precision}, rounded to {self.rounding}; features {self.features} "
            f"({self.features_sha256[:8]}), LPIPS {self.lpips} ({self.lpips_sha256[:8]}), "
            f"hieratok {self.hieratok_version}"
        )


@dataclass(frozen=True)
class GenerationProtocol:
    """What the figures of generated images depend on besides the generator.

    Attributes:
        features: name of the feature network of all figures.
        features_sha256: hash of its weights, or "unversioned".
        image_size: side of the images in pixels.
        resize: how images were brought to that side; samples have it already, as a rule.
        num_samples: how many generated images were evaluated.
        samples: name of their set.
        samples_digest: hash over it.
        reference: name of the set, or file of statistics, that they are compared with.
        reference_digest: hash over the set, or SHA-256 of the file.
        reference_images: how many images the reference's Gaussians are of; None where the file does not say.
        reference_resize: how those were brought to `image_size`.
        neighbours: of precision and recall.
        neighbour_images: reference images of precision and recall; of the samples all take part.
        split_size: images per split of the Inception Score.
        seed: of the order in which the samples are split.
        hieratok_version: of this package.
        sampling: how the images were made, in the words of the sampler: scheduler, steps, guidance, labels, seed.
    """

    features: str
    features_sha256: str
    image_size: int
    resize: str
    num_samples: int
    samples: str
    samples_digest: str
    reference: str
    reference_digest: str
    reference_images: int | None
    reference_resize: str
    neighbours: int
    neighbour_images: int
    split_size: int
    seed: int
    hieratok_version: str
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)

    def describe(self) -> str:
        """Four lines for people."""
        images = f"{self.reference_images:,} images" if self.reference_images is not None else "statistics"
        sampling = ", ".join(f"{name} {value}" for name, value in self.sampling.items()) or "not stated"
        return (
            f"{self.num_samples:,} samples of {self.samples} ({self.samples_digest[:8]}), {self.image_size} px\n"
            f"reference: {images} of {self.reference} ({self.reference_digest[:8]}), {self.reference_resize}\n"
            f"features {self.features} ({self.features_sha256[:8]}), IS by splits of {self.split_size:,} in the order "
            f"of seed {self.seed}, {self.neighbours} neighbours among {self.neighbour_images:,} reference images, "
            f"hieratok {self.hieratok_version}\n"
            f"sampling: {sampling}"
        )
