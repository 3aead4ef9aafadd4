"""What a tokenizer is worth: Frechet distances and image-by-image metrics, each with its protocol."""

from .features import load_features
from .frechet import GaussianSums, frechet_distance
from .protocol import Protocol
from .reconstruction import ReconstructionResult, evaluate_reconstruction

__all__ = [
    "GaussianSums",
    "Protocol",
    "ReconstructionResult",
    "evaluate_reconstruction",
    "frechet_distance",
    "load_features",
]
