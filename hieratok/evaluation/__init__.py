"""What a tokenizer and a generator are worth: metrics of sets and of single images, each with its protocol."""

from .features import load_features
from .frechet import GaussianSums, frechet_distance
from .generation import GenerationResult, evaluate_generation
from .protocol import GenerationProtocol, Protocol
from .reconstruction import ReconstructionResult, evaluate_reconstruction
from .reference import ReferenceStatistics, reference_statistics, write_reference_npz

__all__ = [
    "GaussianSums",
    "GenerationProtocol",
    "GenerationResult",
    "Protocol",
    "ReconstructionResult",
    "ReferenceStatistics",
    "evaluate_generation",
    "evaluate_reconstruction",
    "frechet_distance",
    "load_features",
    "reference_statistics",
    "write_reference_npz",
]
