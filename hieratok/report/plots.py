"""Curves as inline SVG: the smoothed line in front of the raw one, named at its end, in the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingDependencyError
from .metrics import DIRECTIONS, figure, label, quantity
from .palette import LIGHT, css, scale_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

SIZE = (4.7, 2.75)  # inches; at this size the text is readable on a telephone and not loud on a desk
FONT_SIZE = 8.0
AXES = (0.09, 0.15, 0.71, 0.82)  # of the figure: left, bottom, width, height; names of lines stand to the right
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


@dataclass(frozen=True)
class Spec:
    """What a plot of records shows. `dots`: every value is one by itself, as that of an evaluation is."""

    title: str
    note: str
    lines: Sequence[Line]
    logarithmic: bool = True
    dots: bool = False


@dataclass(frozen=True)
class Curve:
    """Points `x` and `y`, both `(n,)` float64, the name of the line through them and its colour of the palette."""

    x: np.ndarray
    y: np.ndarray
    name: str
    colour: str


@dataclass(frozen=True)
class Span:
    """What a dashed line at the height `y` between two places on the x axis says."""

    start: float
    end: float
    y: float
    text: str


def loss_plots(records: Sequence[Record], sides: Sequence[int] = ()) -> list[Plot]:
    """Plots of a tokenizer's records of `metrics.jsonl` whose kind is `train`, with images seen along the x axis.

    Total loss, reconstruction terms, the terms per scale and KL, and the game of stage 2; a plot without data is left
    out.

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
    game = [Line("logits_real", "real", "accent"), Line("logits_fake", "fake", "ink")]
    weights = [Line("adversarial_weight", "GAN", "accent"), Line("alignment_weight", "VF", "ink")]
    norms = [Line("grad_norm", "tokenizer", "accent"), Line("grad_norm_discriminator", "GAN", "ink")]
    if not any("discriminator" in line or "alignment" in line for line in records):
        norms = []
    return plots(records, [
        Spec("Total loss", "the weighted sum that is trained on", [Line("loss", "", "accent")]),
        Spec("Reconstruction terms", "before their weights, summed over the scales", terms),
        Spec("L1 per scale", "each scale against the image resized to it, by side of the token map", scales),
        Spec("KL divergence", "of the posterior from the standard normal, nats per image", [Line("kl", "", "ink")],
             logarithmic=False),
        Spec("Logits of the discriminator", "of real images and of reconstructions: apart, and not too far", game,
             logarithmic=False),
        Spec("Accuracy of the discriminator", "a half is blind, 1 has won", [Line("accuracy", "", "accent")],
             logarithmic=False),
        Spec("Weights of stage 2", "with the ratio of gradients at the last layer", weights),
        Spec("Alignment", "marginal cosine and marginal distance matrix",
             [Line("alignment_cos", "cosine", "accent"), Line("alignment_distance", "distances", "ink")]),
        Spec("Gradient norms", "before clipping", norms),
    ])  # fmt: skip


def generation_plots(records: Sequence[Record], evaluations: Sequence[Record]) -> list[Plot]:
    """Plots of a generator's records, those of training and those of evaluations; a plot without data is left out.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """

    keys = dict.fromkeys(key for line in evaluations for key in line)
    terms = [Line("mse", "MSE", "ink"), Line("vlb", "VLB", "faint")]
    if not any("vlb" in line for line in records):  # the squared error is the loss
        terms = []
    specs = []
    for quantities, logarithmic in ((("gfid",), True), (("inception_score",), False), (("precision", "recall"), False)):
        found = [key for key in keys if quantity(key) in quantities]
        lines = [Line(key, label(quantity(key)) if len(found) > 1 else "", colour)
                 for key, colour in zip(found, ("accent", "ink"), strict=False)]  # fmt: skip
        title = " and ".join(label(line.key) for line in lines)
        specs.append(Spec(title, DIRECTIONS[quantities[0]], lines, logarithmic, dots=True))
    return [
        *plots(records, [
            Spec("Loss", "what is trained on", [Line("loss", "", "accent")]),
            Spec("Terms of the loss", "squared error of the noise, and variational bound of its variance", terms),
        ]),
        *plots(evaluations, specs),
    ]  # fmt: skip


def plots(records: Sequence[Record], specs: Sequence[Spec]) -> list[Plot]:
    """One plot per spec, with images seen along the x axis; lines of fewer than two points are left out."""
    drawn = []
    for spec in specs:
        curves = [Curve(*series(records, line.key), line.name, line.colour) for line in spec.lines]
        curves = [curve for curve in curves if len(curve.x) >= MIN_POINTS]
        if curves:
            canvas = draw(curves, "images seen", logarithmic=spec.logarithmic, dots=spec.dots)
            drawn.append(Plot(spec.title, spec.note, inline(as_svg(canvas, spec.title), spec.title)))
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


def draw(
    curves: Sequence[Curve],
    x_label: str,
    *,
    logarithmic: bool = True,
    dots: bool = False,
    size: tuple[float, float] = SIZE,
    span: Span | None = None,
) -> Figure:
    """One plot of curves, each with its name and last value at its right end.

    Args:
        curves: at least one, each with at least one point.
        x_label: under the axis.
        logarithmic: the y axis; points that are not positive are then left out.
        dots: mark every point, and draw the line through them as it is.
        size: in inches.
        span: a dashed line with a text, in front of the curves.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'hieratok[report]'") from error
    with rc_context(STYLE):
        canvas = Figure(figsize=size)
        axes = canvas.add_axes(AXES)
        ends = []
        for curve in curves:
            keep = curve.y > 0 if logarithmic else np.full(len(curve.y), True)
            x, y = curve.x[keep], curve.y[keep]
            if not len(x):
                continue
            colour = LIGHT[curve.colour]
            level = y if dots else smooth(y)
            if not dots:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
            axes.plot(x, level, color=colour, linewidth=1.6, solid_capstyle="round", marker="o" if dots else "",
                      markersize=3.2)  # fmt: skip
            ends.append((curve, level[-1], x[-1]))
        if logarithmic:
            axes.set_yscale("log")
        _ticks(axes, logarithmic)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
        axes.grid(axis="y", color=LIGHT["rule"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0, pad=AXES[0] * size[0] * 72 - 1)
        for text in axes.get_yticklabels():
            text.set_horizontalalignment("left")
        axes.tick_params(axis="x", length=3, width=0.6)
        if span is not None:
            axes.plot([span.start, span.end], [span.y, span.y], color=LIGHT["soft"], linewidth=1, linestyle=(0, (3, 2)))
            # At the start, where the curve that comes later is still far above.
            axes.annotate(span.text, (span.start, span.y), (4, 3), textcoords="offset points", color=LIGHT["ink"])
        _end_labels(axes, ends)
    return canvas


def as_svg(figure: Figure, title: str) -> str:
    """The file of a plot; the same plot gives the same text. `title` must be the plot's own."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def as_png(figure: Figure) -> bytes:
    """The file of a plot on the page's paper."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor=LIGHT["paper"], metadata={"Software": None})
    return buffer.getvalue()


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


def _end_labels(axes: Any, ends: Sequence[tuple[Curve, float, float]]) -> None:
    """Name and last smoothed value of each curve at its right end, pushed apart where they would overlap."""
    gap = 1.35 * FONT_SIZE / 72 / (axes.figure.get_figheight() * AXES[3])
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    placed = sorted(((to_axes((x, y))[1], curve, y) for curve, y, x in ends), key=lambda item: item[0])
    heights = spread([item[0] for item in placed], gap)
    for height, (_, curve, value) in zip(heights, placed, strict=True):
        text = f"{curve.name}\N{EN SPACE}{figure(value)}".strip()
        axes.text(1.025, height, text, transform=axes.transAxes, color=LIGHT[curve.colour], va="center_baseline",
                  parse_math=False)  # fmt: skip


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
    svg = re.sub(r"<svg[^>]*>", f'<svg {view.group()} role="img" aria-label="{escape(title)}">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    names = {hexadecimal: colour for colour, hexadecimal in LIGHT.items()}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: css(names[m.group()]) if m.group() in names else m.group(), svg)
    return re.sub(r">\s+<", "><", svg).strip()
