"""The two small trained heads on MiniLM's token states: is a sentence language, and which strategy does it
use?

`scripts/train_heads.py` trains them and writes `heads.safetensors`, which ships with the package. Mean
similarity vectors of MiniLM speak of a sentence's matter; its token states also hold word order and manner,
which both questions need.
"""

from __future__ import annotations

from importlib import resources

import torch
from torch import nn

from rlver_dist.simulator.rules.embedding import DIM, STATE_LAYERS

STATE_DIM = DIM * len(STATE_LAYERS)
"""Width of a token's states."""
HEADS_FILE = "heads.safetensors"


class FluencyHead(nn.Module):
    """Token states -> logit that the words make a sentence: a two-layer network a token, pooled by mean and
    maximum."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.token = nn.Linear(STATE_DIM, width)
        self.out = nn.Linear(2 * width, 1)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Judge sentences.

        Args:
            states: `[B, T, STATE_DIM]` float32 token states, padded.
            mask: `[B, T]`, 1 for a token and 0 for padding.

        Returns:
            `[B]` logits, above 0 for what reads as a sentence.
        """
        # The maximum beside the mean: one place where the words do not go together breaks a sentence, and a
        # mean over many tokens would hide it.
        hidden = nn.functional.gelu(self.token(states)) * mask[..., None]
        mean = hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        worst = hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)
        return self.out(torch.cat([mean, worst], dim=-1)).squeeze(-1)


class StrategyHead(nn.Module):
    """Mean token states -> logits over strategies and "none of them"; linear."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(STATE_DIM, classes)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Recognise strategies.

        Args:
            states: `[B, T, STATE_DIM]` float32 token states, padded.
            mask: `[B, T]`, 1 for a token and 0 for padding.

        Returns:
            `[B, classes]` logits, in the order of `Strategy` with "none of them" last.
        """
        return self.out((states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))


def load_heads(classes: int) -> tuple[FluencyHead, StrategyHead]:
    """The shipped heads, in evaluation mode."""
    from safetensors.torch import load

    tensors = load(resources.files("rlver_dist.simulator.rules").joinpath(HEADS_FILE).read_bytes())
    heads = (FluencyHead(), StrategyHead(classes))
    for name, head in zip(("fluency", "strategy"), heads, strict=True):
        own = {
            # Stored in half precision to keep the package small, computed in single.
            key.removeprefix(f"{name}."): value.float()
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        head.load_state_dict(own)
        head.eval().requires_grad_(False)
    return heads
