"""The figures of an evaluation as tiles and tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.tables import label

HEADLINES = ("psnr", "ssim", "lpips", "rfid", "gfid", "inception_score", "precision", "recall")
UNITS = {"psnr": "dB"}
HIGHER, LOWER = "higher is better", "lower is better"
DIRECTIONS = {
    "psnr": HIGHER,
    "ssim": HIGHER,
    "lpips": LOWER,
    "rfid": LOWER,
    "real_halves": "",
    "l1": LOWER,
    "gfid": LOWER,
    "sfid": LOWER,
    "inception_score_std": "",  # before the key that it begins with
    "inception_score": HIGHER,
    "precision": HIGHER,
    "recall": HIGHER,
}
FRECHET = ("rfid", "gfid")  # distances that the one between halves of the real images is a yardstick for


@dataclass(frozen=True)
class Tile:
    """One headline figure, ready to print."""

    label: str
    value: str
    unit: str
    direction: str
    note: str = ""


@dataclass(frozen=True)
class MetricTables:
    """`scales`: a header and a row per scale, coarse to fine. `sets`: name, value, what of; of sets of images."""

    scales: list[list[str]]
    sets: list[list[str]]


def figure(value: Any) -> str:
    """Three significant figures: 21.8, 0.741, 1,230; anything but a number as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def quantity(key: str) -> str:
    """The key without its network: `rfid` for `rfid_mini`; an unknown key as it is."""
    return next((known for known in DIRECTIONS if key == known or key.startswith(f"{known}_")), key)


def tiles(evaluation: Mapping[str, Any]) -> list[Tile]:
    """The headline figures that `eval.json` holds, with the yardstick of the Frechet distance beside it."""
    metrics, found = evaluation.get("metrics", {}), []
    for headline in HEADLINES:
        for key, value in metrics.items():
            if quantity(key) == headline:
                found.append(
                    Tile(label(key), figure(value), UNITS.get(headline, ""), DIRECTIONS[headline],
                         _yardstick(evaluation, key) if headline in FRECHET else "")
                )  # fmt: skip
    return found


def _yardstick(evaluation: Mapping[str, Any], key: str) -> str:
    halves = key.replace(quantity(key), "real_halves")
    metrics, protocol = evaluation["metrics"], evaluation.get("protocol", {})
    counts = evaluation.get("counts", {}).get(key) or [protocol.get("num_samples", protocol.get("num_images"))]
    parts = []
    if halves in metrics:
        parts.append(f"{label(halves)} {figure(metrics[halves])}")
    if counts[0] is not None:
        parts.append(_sizes(counts).replace(" ", "\N{NO-BREAK SPACE}"))
    return " · ".join(parts)


def set_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """All figures of `eval.json` of a generator, a row each: name, value, direction, how many images."""
    counts = evaluation.get("counts", {})
    return [
        [label(key), figure(value), DIRECTIONS.get(quantity(key), ""), _sizes(counts.get(key))]
        for key, value in evaluation.get("metrics", {}).items()
    ]


def metric_tables(evaluation: Mapping[str, Any]) -> MetricTables:
    """All figures of `eval.json`: per scale those that are means over images, apart those of sets of images."""
    metrics, counts = evaluation.get("metrics", {}), evaluation.get("counts", {})
    protocol = evaluation.get("protocol", {})
    of_sets = [key for key in metrics if key in counts or quantity(key) in ("rfid", "real_halves")]
    scales = sorted(((int(side), row) for side, row in evaluation.get("scales", {}).items()), key=lambda item: item[0])
    finest = {key: value for key, value in metrics.items() if key not in of_sets}
    keys = list(dict.fromkeys([*finest, *(key for _, row in scales for key in row)]))
    patch = protocol.get("patch_size")
    if patch and protocol.get("image_size"):
        side = protocol["image_size"] // patch
        scales = [*(item for item in scales if item[0] != side), (side, finest)]
        names = [f"{side} × {side} tokens, {side * patch} px" for side, _ in scales]
    else:
        names = [*(f"{side} × {side} tokens" for side, _ in scales), "finest"]
        scales.append((0, finest))
    rows = [["scale", *(_with_unit(key) for key in keys)]]
    for name, (_, row) in zip(names, scales, strict=True):
        rows.append([name, *(figure(row[key]) if key in row else "–" for key in keys)])
    return MetricTables(rows, [[label(key), figure(metrics[key]), _sizes(counts.get(key))] for key in of_sets])


def _with_unit(key: str) -> str:
    unit = UNITS.get(quantity(key))
    return f"{label(key)}, {unit}" if unit else label(key)


def _sizes(counts: Sequence[int] | None) -> str:
    if not counts:
        return ""
    return f"N = {counts[0]:,}" if len(set(counts)) == 1 else "N = " + " and ".join(f"{n:,}" for n in counts)


RECONSTRUCTION = (
    "{num_images:,} held-out images of {dataset} at {image_size} px ({resize}).",
    "Latents are the posterior’s {posterior}; the model ran in {precision}; reconstructions are rounded to "
    "{rounding} before every metric.",
    "Coarser scales are compared with the original averaged down to their size.",
    "Real halves is the Fréchet distance between two halves of the originals, a yardstick for rFID at this size.",
    "Fréchet distances use the features of “{features}”, with {reference} as the reference; LPIPS uses “{lpips}”.",
)
GENERATION = (
    "{num_samples:,} samples at {image_size} px, against {reference_set} ({reference_resize}).",
    "Drawn by {sampling[scheduler]} in {sampling[num_inference_steps]} steps {guidance}; labels: {sampling[labels]}; "
    "seed {sampling[seed]}.",
    "All figures use the features of “{features}”; the inception score (IS) is the mean over splits of {split_size:,} "
    "samples, precision and recall know {neighbours} neighbours among {neighbour_images:,} images of the reference.",
    "Real halves is the Fréchet distance between two halves of these {reference_images:,}, a yardstick for gFID.",
)


def protocol_sentences(protocol: Mapping[str, Any]) -> list[str]:
    """The protocol spelled out; a sentence whose fields are missing is left out."""
    of_samples = "num_samples" in protocol
    words = {**protocol, **(_generation_words(protocol) if of_samples else {})}
    sentences = []
    for template in GENERATION if of_samples else RECONSTRUCTION:
        try:
            sentences.append(template.format(**words))
        except (KeyError, ValueError, TypeError):
            continue
    if "mini" in (protocol.get("features"), protocol.get("lpips")):
        sentences.append(
            "“mini” is the small network that ships with hieratok; its figures are not comparable with published ones."
        )
    return sentences


def _generation_words(protocol: Mapping[str, Any]) -> dict[str, str]:
    """What generated samples are compared with, and how they were guided."""
    images, name = protocol.get("reference_images"), protocol.get("reference", "the reference")
    scale, interval = ((protocol.get("sampling") or {}).get(key) for key in ("guidance_scale", "guidance_interval"))
    guidance = "without guidance" if scale in (None, 1) else f"with guidance {scale:g}"
    if interval and list(interval) != [0, 1] and guidance != "without guidance":
        guidance += f" between the times {interval[0]:g} and {interval[1]:g} (1 is noise)"
    return {
        "reference_set": f"{images:,} images of {name}" if images else f"statistics of {name}",
        "guidance": guidance,
    }
