"""Everything that the values of an evaluation depend on, kept and printed with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SAME_IMAGES = "the same images that were reconstructed"


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
