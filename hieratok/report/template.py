"""Pages out of the templates beside this file, each one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..engine.run_folder import flatten
from ..errors import MissingDependencyError
from ..files import write_atomically
from . import palette
from .metrics import figure, protocol_sentences


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write a page in one step: a reader meets the old file or the new one, never a part.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise MissingDependencyError("reports need jinja2: pip install 'hieratok[report]'") from error
    environment = Environment(
        loader=PackageLoader("hieratok.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "figure": figure,
        "flatten": flatten,
        "protocol_sentences": protocol_sentences,
        "scale_colours": palette.scale_colours,
    }
    html = environment.get_template(template).render(light=palette.LIGHT, dark=palette.DARK, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html.encode())
    return path
