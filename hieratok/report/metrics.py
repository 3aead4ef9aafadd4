"""The figures of an evaluation as tiles and tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.reconstruction import label

HEADLINES = ("psnr", "ssim", "lpips", "rfid")
UNITS = {"psnr": "dB"}
DIRECTIONS = {
    "psnr": "higher is better",
    "ssim": "higher is better",
    "lpips": "lower is better",
    "rfid": "lower is better",
    "real_halves": "",
    "l1": "lower is better",
}


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
                         _yardstick(evaluation, key) if headline == "rfid" else "")
                )  # fmt: skip
    return found


def _yardstick(evaluation: Mapping[str, Any], rfid: str) -> str:
    halves = rfid.replace("rfid", "real_halves")
    counts = evaluation.get("counts", {})
    n = counts.get(rfid, [evaluation.get("protocol", {}).get("num_images")])[0]
    parts = []
    if halves in evaluation["metrics"]:
        parts.append(f"{label(halves)} {figure(evaluation['metrics'][halves])}")
    if n is not None:
        parts.append(f"N\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{n:,}")
    return " · ".join(parts)


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


def protocol_sentences(protocol: Mapping[str, Any]) -> list[str]:
    """The protocol spelled out; a sentence whose fields are missing is left out."""
    templates = [
        "{num_images:,} held-out images of {dataset} at {image_size} px ({resize}).",
        "Latents are the posterior’s {posterior}; the model ran in {precision}; reconstructions are rounded to "
        "{rounding} before every metric.",
        "Coarser scales are compared with the original averaged down to their size.",
        "Real halves is the Fréchet distance between two halves of the originals, a yardstick for rFID at this size.",
        "Fréchet distances use the features of “{features}”, with {reference} as the reference; LPIPS uses “{lpips}”.",
    ]
    sentences = []
    for template in templates:
        try:
            sentences.append(template.format(**protocol))
        except (KeyError, ValueError):
            continue
    if "mini" in (protocol.get("features"), protocol.get("lpips")):
        sentences.append(
            "“mini” is the small network that ships with hieratok; its figures are not comparable with published ones."
        )
    return sentences
