"""The terms that a tokenizer is trained on, one file each, and their sum."""

from .tokenizer_loss import LossOutput, TokenizerLoss, TokenizerLossConfig

__all__ = ["LossOutput", "TokenizerLoss", "TokenizerLossConfig"]
