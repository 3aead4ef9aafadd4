"""The page's colours, once for light and once for dark; the template writes them as CSS variables.

Plots and diagrams name a colour by `css("ink")`, so one SVG reads in both.
"""

from __future__ import annotations

# Coarse to fine. A scale has the same colour in the diagram, in the gallery and in the curves.
LIGHT = {
    "paper": "#fbfaf7", "raised": "#f3f1eb", "ink": "#1f1d1a", "soft": "#5f5b53", "faint": "#8b867b",
    "rule": "#e2ded4", "accent": "#a8481f",
    "scale-0": "#b87a1e", "scale-1": "#b3502f", "scale-2": "#99345f", "scale-3": "#62398b", "scale-4": "#2d4f9c",
    "scale-5": "#1d6b78",
}  # fmt: skip
DARK = {
    "paper": "#161513", "raised": "#201f1c", "ink": "#edeae3", "soft": "#b0aaa0", "faint": "#858076",
    "rule": "#35322d", "accent": "#f0935f",
    "scale-0": "#e8b35f", "scale-1": "#ea8c66", "scale-2": "#e07aa3", "scale-3": "#b48fe4", "scale-4": "#86a6f2",
    "scale-5": "#67c3d0",
}  # fmt: skip
NUM_SCALE_COLOURS = 6


def css(name: str) -> str:
    """The CSS value of a colour, with the light one where no page defines it."""
    return f"var(--{name}, {LIGHT[name]})"


def scale_colours(num_scales: int) -> list[str]:
    """One colour name per scale, coarse to fine, spread over the ramp; a single scale is the accent."""
    if num_scales == 1:
        return ["accent"]
    if num_scales > NUM_SCALE_COLOURS:
        return [f"scale-{i * (NUM_SCALE_COLOURS - 1) // (num_scales - 1)}" for i in range(num_scales)]
    return [f"scale-{i}" for i in range(num_scales)]
