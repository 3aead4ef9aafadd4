"""The networks. They import torch, diffusers' mixins and each other, nothing of training."""
