"""The critic's model: the layers of a language model under a value head.

The value at a trained token is read where the policy's log-prob of it is: from the hidden state of the token
before, which has seen the history and what was said of the turn so far, but not the token itself. A backbone
that learns brings there what the value needs. In a frozen one that hidden state is about the next token, so
the head gets the mean over all tokens so far instead, where what the user said weighs as much as the words of
the reply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlver_dist.config.learner import check_num_layers
from rlver_dist.experience.packing import PackedRow, Span
from rlver_dist.learner.scoring import hidden_states, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueHead(nn.Module):
    """Hidden states to values, linear or through one hidden layer.

    The last layer starts at zero, so that the first values are 0 and not noise, which would reach the policy
    as advantages.
    """

    def __init__(self, hidden_size: int, head_units: int, seed: int) -> None:
        """`head_units` of 0 makes the head linear; `seed` draws the hidden layer, alike on every rank."""
        super().__init__()
        # Torch's global generator stays as it is: what else a run draws must not depend on the critic.
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            hidden = [nn.Linear(hidden_size, head_units), nn.Tanh()] if head_units else []
            last = nn.Linear(head_units or hidden_size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values of hidden states.

        Args:
            hidden: `[S, H]`.

        Returns:
            `[S]` float32, in reward.
        """
        # A frozen backbone may be in bfloat16 where the head on it is in float32.
        return self.layers(hidden.to(next(self.parameters()).dtype)).squeeze(-1).float()


class ValueModel(nn.Module):
    """Backbone and head in one, for a backbone that learns."""

    def __init__(self, backbone: PreTrainedModel, head: ValueHead, *, recompute: bool) -> None:
        """`recompute` trades the backbone's activations for time."""
        super().__init__()
        # ZeRO-3 lays all parameters into one buffer, so they are of one dtype.
        self.backbone = backbone
        self.head = head.to(backbone.dtype)
        if recompute:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        spans: list[Span],
        logit_index: torch.Tensor,
    ) -> torch.Tensor:
        """Values before chosen tokens of one packed row.

        Args:
            token_ids: `[T]`.
            position_ids: `[T]`, each token's place in its own sample.
            spans: who attends to whom.
            logit_index: `[S]` indices into the row of the tokens before the valued ones.

        Returns:
            `[S]` float32, in reward.
        """
        return self.head(hidden_states(self.backbone, token_ids, position_ids, spans)[logit_index])


def load_backbone(path: str, dtype: torch.dtype, num_layers: int) -> PreTrainedModel:
    """The first layers of a language model and its last norm, without the vocabulary head.

    Args:
        path: Hugging Face folder or hub id.
        dtype: format of the weights.
        num_layers: layers to keep; 0 keeps all.

    Raises:
        ConfigError: the model has fewer layers.
    """
    backbone: Any = load_model(path, dtype).base_model
    check_num_layers(num_layers, len(backbone.layers))
    if num_layers:
        # The last norm stays: it brings the kept layers' states to a scale that a head can learn from.
        backbone.layers = backbone.layers[:num_layers]
        backbone.config.num_hidden_layers = num_layers
    return backbone


@torch.no_grad()
def frozen_features(backbone: torch.nn.Module, row: PackedRow) -> torch.Tensor:
    """What a frozen backbone says of the state before each trained token.

    Args:
        backbone: a Hugging Face model without its head.
        row: a packed row.

    Returns:
        `[S, H]` float32, in the order of the row's trained tokens.
    """
    hidden = hidden_states(backbone, row.token_ids, row.position_ids, row.spans)
    return running_means(hidden, row.position_ids, row.spans)[row.logit_index]


def running_means(hidden: torch.Tensor, position_ids: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """Mean of hidden states over each token and all that it attends to.

    A span's context, where it has one, starts a span without one, as `pack` lays them out.

    Args:
        hidden: `[T, H]`; each state is brought to root mean square 1 first.
        position_ids: `[T]`, each token's place in its own sample.
        spans: who attends to whom.

    Returns:
        `[T, H]` float32.
    """
    # At equal size, so that no single large state decides the mean.
    sums = torch.nn.functional.rms_norm(hidden.float(), hidden.shape[-1:])
    start = 0
    for span in spans:
        own = sums[start : start + span.length].cumsum(dim=0)
        # The context's last sum already covers all of the context; a branch goes on from there.
        context_end = span.context_start + span.context_length
        sums[start : start + span.length] = own + sums[context_end - 1] if span.context_length else own
        start += span.length
    return sums / (position_ids[:, None] + 1)
