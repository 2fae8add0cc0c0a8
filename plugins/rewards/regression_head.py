"""The five linear layers, without activations, that ImageReward and the LAION aesthetic predictor share."""

from __future__ import annotations

from torch import Tensor, nn

from rlhf_t2i.plugins.precision import Float32


class RegressionHead(Float32):
    """Features [B, D] to a number [B], in float32; weights are named ``layers.{0,2,4,6,7}`` as published."""

    def __init__(self, features: int) -> None:
        super().__init__()
        # The dropouts do nothing in eval mode; they keep the published numbering.
        self.layers = nn.Sequential(
            nn.Linear(features, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """A number [B] for each row of [B, D]."""
        return self.layers(features).squeeze(-1)
