"""Loss curves as inline SVG: the smoothed line in front of the raw one, named at its end, in the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MissingDependencyError
from .metrics import figure
from .palette import LIGHT, css, scale_colours

Record = Mapping[str, Any]

SIZE = (4.7, 2.75)  # inches; at this size the text is readable on a telephone and not loud on a desk
FONT_SIZE = 8.0
AXES = (0.09, 0.15, 0.73, 0.82)  # of the figure: left, bottom, width, height; names of lines stand to the right
MIN_POINTS = 2
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": FONT_SIZE,
    "axes.edgecolor": LIGHT["rule"],
    "axes.labelcolor": LIGHT["faint"],
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


@dataclass(frozen=True)
class Plot:
    """A titled plot; `svg` is an `<svg>` element that scales with its container."""

    title: str
    note: str
    svg: str


@dataclass(frozen=True)
class Line:
    """One curve: the key in the records, its name on the plot, its colour of the palette."""

    key: str
    name: str
    colour: str


def loss_plots(records: Sequence[Record], sides: Sequence[int] = ()) -> list[Plot]:
    """Plots of the records of `metrics.jsonl` whose kind is `train`, with images seen along the x axis.

    Total loss, reconstruction terms, the terms per scale and KL; a plot without data is left out.

    Args:
        records: in the order of training.
        sides: sides of the token maps, coarse to fine; without them there is no plot per scale.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    terms = [Line("l1", "L1", "ink"), Line("mse", "MSE", "faint"), Line("lpips", "LPIPS", "accent")]
    scales = [
        Line(f"l1/{side}", f"{side} × {side}", colour)
        for side, colour in zip(sides, scale_colours(max(len(sides), 1)), strict=False)
    ]
    plots = [
        ("Total loss", "the weighted sum that is trained on", [Line("loss", "", "accent")], True),
        ("Reconstruction terms", "before their weights, summed over the scales", terms, True),
        ("L1 per scale", "each scale against the image resized to it, by side of the token map", scales, True),
        ("KL divergence", "of the posterior from the standard normal, nats per image", [Line("kl", "", "ink")], False),
    ]
    drawn = []
    for title, note, lines, logarithmic in plots:
        present = [line for line in lines if len(series(records, line.key)[0]) >= MIN_POINTS]
        if present:
            drawn.append(Plot(title, note, curves(title, records, present, logarithmic)))
    return drawn


def series(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images seen and the finite values of `key`, both `(n,)` float64."""
    points = [
        (r["samples_seen"], r[key])
        for r in records
        if isinstance(r.get(key), (int, float)) and np.isfinite(r[key]) and "samples_seen" in r
    ]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred mean over about a 25th of the run, narrower at the ends so that they are not bent; `(n,)`."""
    reach = len(values) // 50
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    near = np.minimum(np.minimum(i, len(values) - 1 - i), reach)
    return (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)


def curves(title: str, records: Sequence[Record], lines: Sequence[Line], logarithmic: bool) -> str:
    """One plot of `lines` as an `<svg>` string; the same records give the same string. `title` must be its own."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'hieratok[report]'") from error
    with rc_context({**STYLE, "svg.hashsalt": title}):
        canvas = Figure(figsize=SIZE)
        axes = canvas.add_axes(AXES)
        ends = []
        for line in lines:
            x, y = series(records, line.key)
            if logarithmic:
                x, y = x[y > 0], y[y > 0]
            colour = LIGHT[line.colour]
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
            level = smooth(y)
            axes.plot(x, level, color=colour, linewidth=1.6, solid_capstyle="round")
            ends.append((line, level[-1], x[-1]))
        if logarithmic:
            axes.set_yscale("log")
        _ticks(axes, logarithmic)
        axes.set_xlim(left=0)
        axes.set_xlabel("images seen")
        axes.grid(axis="y", color=LIGHT["rule"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0, pad=AXES[0] * SIZE[0] * 72 - 1)
        for text in axes.get_yticklabels():
            text.set_horizontalalignment("left")
        axes.tick_params(axis="x", length=3, width=0.6)
        _end_labels(axes, ends)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(buffer.getvalue(), title)


def _ticks(axes: Any, logarithmic: bool) -> None:
    from matplotlib import ticker

    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: thousands(v)))
    if logarithmic:
        low, high = axes.get_ylim()
        decades = np.log10(high / low)
        subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        if decades < 0.8:  # too few round numbers of a logarithmic axis lie inside
            axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
        else:
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: thousands(v) if abs(v) >= 1e4 else f"{v:,.4g}"))


def thousands(value: float) -> str:
    """Axis numbers: 0, 500, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _end_labels(axes: Any, ends: Sequence[tuple[Line, float, float]]) -> None:
    """Name and last smoothed value of each line at its right end, pushed apart where they would overlap."""
    gap = 1.35 * FONT_SIZE / 72 / (SIZE[1] * AXES[3])
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    placed = sorted(((to_axes((x, y))[1], line, y) for line, y, x in ends), key=lambda item: item[0])
    heights = spread([item[0] for item in placed], gap)
    for height, (_, line, value) in zip(heights, placed, strict=True):
        text = f"{line.name}\N{EN SPACE}{figure(value)}".strip()
        axes.text(1.025, height, text, transform=axes.transAxes, color=LIGHT[line.colour], va="center_baseline")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as a sweep up and a sweep down need to be `gap` apart inside [0, 1]."""
    placed = list(heights)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def inline(svg: str, title: str) -> str:
    """Matplotlib's file as an element of a page.

    Fonts and colours become the page's; ids that nothing refers to go, as does the style sheet, which would apply to
    the whole page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg {view.group()} role="img" aria-label="{title}">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    names = {hexadecimal: colour for colour, hexadecimal in LIGHT.items()}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: css(names[m.group()]) if m.group() in names else m.group(), svg)
    return re.sub(r">\s+<", "><", svg).strip()
