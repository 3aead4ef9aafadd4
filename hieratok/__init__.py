"""hieratok: a multi-scale ViT image tokenizer for latent generative models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where the public names live; imported at first use, so that `import hieratok` and `hieratok --help` are quick.
_PUBLIC = {
    "HieraTok": ".models.tokenizer",
    "DiT": ".models.dit",
    "HieraTokPipeline": ".generation.pipeline",
    "create_model": ".models.presets",
    "train_tokenizer": ".training.tokenizer",
    "TokenizerRun": ".training.tokenizer",
    "train_generator": ".training.generator",
    "GeneratorRun": ".training.generator",
    "TOOLS": ".testbed",
    "judge": ".evaluation.judge",
    "reconstruct": ".report.reconstruct",
    "encode": ".data.latents",
    "evaluate_reconstruction": ".evaluation.reconstruction",
    "load_tokenizer": ".engine.run_folder",
    "load_autoencoder": ".engine.run_folder",
    "load_pipeline": ".generation.loading",
    "evaluate_generation": ".evaluation.generation",
    "open_source": ".data.opening",
}

# A pipeline loads a component of another library only if that library has the base class under this name.
_FOR_DIFFUSERS = {
    "ModelMixin": "diffusers.models.modeling_utils",
    "DiffusionPipeline": "diffusers.pipelines.pipeline_utils",
}

if TYPE_CHECKING:
    from .data.latents import encode as encode
    from .data.opening import open_source as open_source
    from .engine.run_folder import load_autoencoder as load_autoencoder
    from .engine.run_folder import load_tokenizer as load_tokenizer
    from .evaluation.generation import evaluate_generation as evaluate_generation
    from .evaluation.judge import judge as judge
    from .evaluation.reconstruction import evaluate_reconstruction as evaluate_reconstruction
    from .generation.loading import load_pipeline as load_pipeline
    from .generation.pipeline import HieraTokPipeline as HieraTokPipeline
    from .models.dit import DiT as DiT
    from .models.presets import create_model as create_model
    from .models.tokenizer import HieraTok as HieraTok
    from .report.reconstruct import reconstruct as reconstruct
    from .testbed import TOOLS as TOOLS
    from .training.generator import GeneratorRun as GeneratorRun
    from .training.generator import train_generator as train_generator
    from .training.tokenizer import TokenizerRun as TokenizerRun
    from .training.tokenizer import train_tokenizer as train_tokenizer

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    home = _PUBLIC.get(name) or _FOR_DIFFUSERS.get(name)
    if home is None:
        raise AttributeError(f"module 'hieratok' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
