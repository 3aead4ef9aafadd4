"""Images from where they are to batches: sources, decoding, framing, order, loading."""

from .opening import DataConfig, open_source
from .source import ImageSource

__all__ = ["DataConfig", "ImageSource", "open_source"]
