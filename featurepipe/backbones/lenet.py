"""LeNet-5, after LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from featurepipe.backbones.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

PREPROCESSING = Preprocessing(
    resize=(32, 32), crop=(32, 32), interpolation="bilinear", antialias=True, mean=(0.5,), std=(0.5,), colour="grey"
)


class LeNet5(nn.Module):
    """LeNet-5 for one grey 32 x 32 image per row, ten classes, 61,706 parameters.

    The layer shapes are the paper's (6 and 16 maps, then 120, 84 and 10 units). Modernised in three places, as usual:
    plain ReLU for the scaled tanh, maximum pooling for trainable subsampling, and full connections between S2 and C3
    and to the output for the paper's hand-made table and radial basis functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU())
        self.s2 = nn.MaxPool2d(2)
        self.c3 = nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU())
        self.s4 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.c5 = nn.Sequential(nn.Linear(16 * 5 * 5, 120), nn.ReLU())
        self.f6 = nn.Sequential(nn.Linear(120, 84), nn.ReLU())
        self.output = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, 10) for images (N, 1, 32, 32)."""
        maps = self.s4(self.c3(self.s2(self.c1(images))))
        logits: Tensor = self.output(self.f6(self.c5(self.flatten(maps))))
        return logits
