"""What a tokenizer or a generator costs: parameters, operations and tokens, beside Tables 6 and 7 of the paper.

Operations are counted by PyTorch's own counter on tensors without storage (the meta device), so that the paper's
models are counted in a second on any machine. One multiplication and one addition count as two operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .presets import build_dit, build_model

# Table 7: millions of parameters, GFLOPs, encoder tokens, decoder tokens
TABLE_7 = {
    "paper, single scale": (346.25, 182.36, 256, 256),
    "paper, multi-scale": (401.18, 230.45, 256, 341),
}


@dataclass(frozen=True)
class Cost:
    """Of one image forwards through encoder and decoder."""

    encoder_parameters: int
    decoder_parameters: int
    encoder_flops: int
    decoder_flops: int
    encoder_tokens: int
    decoder_tokens: int

    @property
    def parameters(self) -> int:
        return self.encoder_parameters + self.decoder_parameters

    @property
    def flops(self) -> int:
        return self.encoder_flops + self.decoder_flops


def cost(model: Mapping[str, Any] | str) -> Cost:
    """The cost of a preset's name or of the `model` section of a recipe.

    Raises:
        ConfigError: no such preset or field.
    """
    values = {"preset": model} if isinstance(model, str) else dict(model)
    with torch.device("meta"):
        # The masked form would be counted with the products that the mask hides.
        network = build_model({**values, "attention_backend": "prefix"}).eval()
        config = network.config
        images = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        side = config.image_size // config.patch_size
        latents = torch.empty(1, config.latent_channels, side, side)
    counted = []
    for call, argument in ((network.encode, images), (network.decode, latents)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(argument)
        counted.append(counter.get_total_flops())
    return Cost(
        encoder_parameters=sum(p.numel() for p in network.encoder.parameters()),
        decoder_parameters=sum(p.numel() for p in network.decoder.parameters()),
        encoder_flops=counted[0],
        decoder_flops=counted[1],
        encoder_tokens=side * side,
        decoder_tokens=network.layout.num_tokens,
    )


def cost_rows(models: Mapping[str, Mapping[str, Any] | str]) -> list[list[str]]:
    """A header and one row per named model, with Table 7's two rows at the end, as text."""
    rows = [["model", "parameters", "GFLOPs", "encoder tokens", "decoder tokens"]]
    for name, model in models.items():
        c = cost(model)
        rows.append(
            [
                name,
                f"{c.parameters / 1e6:.2f}M",
                f"{c.flops / 1e9:.2f}",
                str(c.encoder_tokens),
                str(c.decoder_tokens),
            ]
        )
    for name, (parameters, gflops, encoder_tokens, decoder_tokens) in TABLE_7.items():
        rows.append([name, f"{parameters:.2f}M", f"{gflops:.2f}", str(encoder_tokens), str(decoder_tokens)])
    return rows


# Table 6: millions of parameters
TABLE_6 = {"paper, DiT-XL": 675, "paper, DiT-L": 458, "paper, DiT-B": 130}


def dit_cost(model: Mapping[str, Any] | str) -> tuple[int, int, int]:
    """(parameters, operations of one forward pass of one latent, tokens) of a generator's preset or `model` section.

    Raises:
        ConfigError: no such preset or field.
    """
    values = {"preset": model} if isinstance(model, str) else dict(model)
    with torch.device("meta"):
        network = build_dit({**values, "attention_backend": "prefix"}).eval()
        side = network.config.sample_size
        latents = torch.empty(1, network.config.in_channels, side, side)
        inputs = (latents, torch.empty(1), torch.empty(1, dtype=torch.long))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops(), network.layout.num_tokens


def dit_cost_table(models: Mapping[str, Mapping[str, Any] | str]) -> str:
    """A header, one row per named generator, and the parameters of Table 6, as aligned text."""
    rows = [["generator", "parameters", "GFLOPs per step", "tokens"]]
    for name, model in models.items():
        parameters, flops, tokens = dit_cost(model)
        rows.append([name, f"{parameters / 1e6:.2f}M", f"{flops / 1e9:.2f}", str(tokens)])
    rows += [[name, f"{millions}M", "", ""] for name, millions in TABLE_6.items()]
    return format_rows(rows)


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned plain text; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def cost_table(models: Mapping[str, Mapping[str, Any] | str]) -> str:
    """What `hieratok cost` prints for named models."""
    return format_rows(cost_rows(models))
