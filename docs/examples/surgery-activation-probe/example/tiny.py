"""A model small enough to try a recipe on."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * size, size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Add to the hidden states what the block makes of them."""
        return hidden + self.down(self.act(self.up(hidden)))


class Tiny(nn.Module):
    """Two blocks, a head, and an example of what to call it with."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(4), Block(4)])
        self.head = nn.Linear(4, 3)
        self.example_input_array = {"hidden": torch.linspace(-1, 1, 8).reshape(2, 4)}

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the blocks, then the head."""
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def make_model() -> Tiny:
    """Return the model, the same each time; a recipe names it `tiny:make_model`."""
    torch.manual_seed(0)
    return Tiny()
