"""How good generated images are: gFID, sFID, Inception Score, precision and recall.

Paper: Sec. 4 (gFID and IS of 50,000 samples); all as ADM's evaluator has them (Dhariwal & Nichol 2021). The protocol of
each figure is in `docs/evaluation.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..data.frame import Frame
from ..data.source import ImageSource
from ..errors import ConfigError
from .collect import SetFeatures, checked_frame, collect_features
from .features import FeatureNetwork, figure_key, load_features
from .frechet import frechet_distance, small_sample_warnings
from .inception_score import SPLIT_SIZE, inception_score
from .precision_recall import NEIGHBOURS, precision_recall
from .protocol import GenerationProtocol, resize_rule
from .reference import MAX_PR_IMAGES, ReferenceStatistics, reference_statistics
from .tables import align, label, number, save_json

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class GenerationResult:
    """The figures of one evaluation and what they depend on.

    Attributes:
        metrics: `gfid_mini` (`gfid` when the network is Inception; so with all of them), `sfid_mini`,
            `inception_score_mini`, `inception_score_std_mini`, `precision_mini`, `recall_mini`, and `real_halves_mini`,
            the distance between two halves of the reference. What network, reference or number of images do not permit
            is absent.
        counts: how many images each figure is of, by the keys of `metrics`: samples, then reference images where they
            have a part and their number is known; of the real halves, those at even and at odd positions.
        protocol: everything else that the figures depend on.
        warnings: what a reader of the figures must know.
    """

    metrics: dict[str, float]
    counts: dict[str, tuple[int, ...]]
    protocol: GenerationProtocol
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "metrics": dict(self.metrics),
            "counts": {key: list(counts) for key, counts in self.counts.items()},
            "protocol": self.protocol.to_dict(),
            "warnings": list(self.warnings),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON; whoever reads the file meets the old one or the new one, never a part."""
        save_json(path, self.to_dict())

    def table(self) -> str:
        """The figures, aligned for a terminal, with protocol and warnings under them."""
        rows = [
            [label(key), number(value), "N = " + " and ".join(f"{n:,}" for n in self.counts[key])]
            for key, value in self.metrics.items()
        ]
        warnings = [f"warning: {warning}" for warning in self.warnings]
        return "\n\n".join([*([align(rows)] if rows else []), self.protocol.describe(), *warnings])


def evaluate_generation(
    samples: ImageSource,
    reference: ImageSource | ReferenceStatistics | str | Path,
    *,
    image_size: int,
    features: str | FeatureNetwork | Callable[[Tensor], Tensor] = "mini",
    feature_weights: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    seed: int = 0,
    split_size: int = SPLIT_SIZE,
    neighbours: int = NEIGHBOURS,
    max_pr_images: int = MAX_PR_IMAGES,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    frame: Frame | None = None,
    sampling: Mapping[str, Any] | None = None,
    max_bad_fraction: float = 0.01,
) -> GenerationResult:
    """Compare generated images with real ones.

    Figures do not depend on `batch_size`, `num_workers` or the number of processes beyond the last digits of floating
    point.

    Args:
        samples: the generated images, all of them.
        reference: real images; or what names them or a file of statistics, see `reference_statistics`; or its result,
            which an evaluation that is repeated computes once.
        image_size: side to which images of both sets are brought; that at which the samples were made.
        features: feature network of all figures, see `load_features`.
        feature_weights: local file of that network.
        batch_size: images at once, per process.
        num_workers: processes that decode images.
        device: where to compute; None is the accelerator's, or the CPU.
        seed: of the order in which the samples are split for the Inception Score; their own is often by class.
        split_size: images per split of the Inception Score.
        neighbours: of precision and recall.
        max_pr_images: reference images for precision and recall, as ADM has 10,000; of the samples all take part.
            Statistics that are given have their own number.
        accelerator: of a run with several processes; each takes every n-th image and all return the same result.
        progress: show bars (on the main process).
        frame: how images are cropped; None is the centre.
        sampling: how the images were made, for the protocol; None is what `samples.protocol` says, if it is there.
        max_bad_fraction: the part of the images of either set that may be bad; they are left out.

    Raises:
        ConfigError: a size or number that is not above 0, an unknown network, or a frame of another size.
        DataError: too many bad images, or no good one, or a damaged file.
        HieratokError: another process of the run failed.
        NonFiniteError: a feature is NaN or infinite.
        ProtocolError: images too small for the feature network, a reference of another network or size, or one of
            fewer than 2 images.
    """
    for name, value in {"split_size": split_size, "neighbours": neighbours, "max_pr_images": max_pr_images}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    frame = checked_frame(frame, image_size)
    network = load_features(features, feature_weights, device or (accelerator.device if accelerator else "cpu"))
    passing: dict[str, Any] = {
        "batch_size": batch_size, "num_workers": num_workers, "accelerator": accelerator, "progress": progress,
        "max_bad_fraction": max_bad_fraction,
    }  # fmt: skip
    if not isinstance(reference, ReferenceStatistics):
        reference = reference_statistics(
            reference, network, image_size, max_pr_images=max_pr_images, frame=frame, **passing
        )
    reference.check(network, image_size)
    seen = collect_features(samples, network, frame, keep=None, title="samples", **passing)
    metrics, counts, warnings = _figures(seen, reference, seed, split_size, neighbours)
    made_at = getattr(samples, "image_size", image_size)
    if made_at != image_size:
        warnings.append(f"the samples are of {made_at} px and were resized to {image_size}")
    protocol = GenerationProtocol(
        features=network.name,
        features_sha256=network.sha256,
        image_size=image_size,
        resize=resize_rule(frame),
        num_samples=seen.count,
        samples=samples.name,
        samples_digest=samples.digest,
        reference=reference.source,
        reference_digest=reference.source_digest,
        reference_images=reference.count,
        reference_resize=reference.resize,
        neighbours=neighbours,
        neighbour_images=0 if reference.neighbours is None else len(reference.neighbours),
        split_size=split_size,
        seed=seed,
        hieratok_version=__version__,
        sampling=dict(getattr(samples, "protocol", {}) if sampling is None else sampling),
    )
    named = {key: figure_key(key, network.name) for key in metrics}
    return GenerationResult(
        {named[key]: value for key, value in metrics.items()},
        {named[key]: value for key, value in counts.items()},
        protocol,
        warnings,
    )


def _figures(
    seen: SetFeatures, reference: ReferenceStatistics, seed: int, split_size: int, neighbours: int
) -> tuple[dict[str, float], dict[str, tuple[int, ...]], list[str]]:
    """Metrics, counts (both without the network's name) and warnings."""
    n, count = seen.count, reference.count
    metrics: dict[str, float] = {}
    counts: dict[str, tuple[int, ...]] = {}
    warnings = []
    gaussian = seen.gaussian()
    if n >= 2:
        dims = {reference.features: gaussian.dim}
        metrics["gfid"] = frechet_distance(gaussian, reference.pooled)
        if seen.spatial is not None and reference.spatial is not None:
            dims[f"{reference.features}'s spatial features"] = seen.spatial.dim
            metrics["sfid"] = frechet_distance(seen.spatial, reference.spatial)
        counts |= dict.fromkeys(metrics, (n,) if count is None else (n, count))
        warnings += small_sample_warnings(n if count is None else min(n, count), dims)
    else:
        warnings.append(f"{n:,} samples are too few for Frechet distances, which are left out; give 2 or more")
    if seen.logits is not None:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        score = inception_score(seen.logits[order], split_size)
        metrics["inception_score"] = score.mean
        if score.splits > 1:
            metrics["inception_score_std"] = score.std
        elif n < split_size:
            warnings.append(
                f"the Inception Score is that of a single split of {n:,} samples, lower than one of {split_size:,}"
            )
        if score.used < n:
            warnings.append(f"{n - score.used:,} samples fill no split and are left out of the Inception Score")
        counts |= {key: (score.used,) for key in metrics if key.startswith("inception")}
    real = reference.neighbours
    if real is None:
        warnings.append(f"{reference.source} holds no single images, which precision and recall need")
    elif min(n, len(real)) <= neighbours:
        warnings.append(f"{n:,} samples and {len(real):,} reference images are too few for precision and recall")
    else:
        device = gaussian.sum.device
        metrics["precision"], metrics["recall"] = precision_recall(real.to(device), seen.pooled.to(device), neighbours)
        counts |= dict.fromkeys(("precision", "recall"), (n, len(real)))
        if min(n, len(real)) < MAX_PR_IMAGES:
            warnings.append(
                f"precision and recall depend on how many images there are, and {n:,} samples and {len(real):,} "
                f"reference images are few"
            )
    if reference.real_halves is not None and count is not None and reference.even_count is not None:
        metrics["real_halves"] = reference.real_halves
        counts["real_halves"] = (reference.even_count, count - reference.even_count)
    return metrics, counts, warnings
