"""From a dialogue to the token rows that the learner trains on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from rlver_dist.dialogue import Dialogue, Turn


@dataclass(kw_only=True, slots=True)
class TurnSample:
    """One row of tokens: one or more consecutive turns of a dialogue, exactly as the engine saw and sampled
    them.

    Attributes:
        token_ids: `[L]` prompt and replies.
        loss_mask: `[L]` True on sampled tokens, which are trained; position 0 is always False.
        rollout_logprobs: `[L]` log-prob in nats under the sampling distribution; 0.0 where not sampled.
        dialogue_id: whose turns these are.
        group_id: the dialogue's group.
        turn_index: index of the first turn in the row.
    """

    token_ids: list[int]
    loss_mask: list[bool]
    rollout_logprobs: list[float]
    dialogue_id: str
    group_id: str
    turn_index: int

    @property
    def num_trained(self) -> int:
        """Sampled tokens."""
        return sum(self.loss_mask)

    def trained_logprobs(self) -> Tensor:
        """`[num_trained]` float32, log-probs of the sampled tokens as sampled, nats."""
        return torch.tensor(list(compress(self.rollout_logprobs, self.loss_mask)), dtype=torch.float32)


@dataclass(kw_only=True, slots=True)
class ImitationSample:
    """A reply to imitate in the think format.

    Attributes:
        sample: the prompt that asks for thinking, then tags, thought and reply, all trained.
        plain: the prompt that does not, then the reply; trained are the tokens of the reply that both samples
            have, which are the last `plain.num_trained` trained ones of `sample`.
    """

    sample: TurnSample
    plain: TurnSample


def to_samples(dialogue: Dialogue) -> list[TurnSample]:
    """Training samples of a dialogue, in turn order.

    A turn joins the last sample while its prompt extends that sample's tokens, so that a token is computed
    once; where the history was edited (thinking stripped, a message dropped) the prompt differs and a new
    sample begins. Samples without a sampled token are left out.

    Args:
        dialogue: one that has ended, for whatever reason.

    Returns:
        Samples that together have every sampled token of the dialogue exactly once as a trained one.

    Raises:
        ValueError: a turn has no prompt, or its log-probs do not fit its reply or are not finite.
    """
    samples: list[TurnSample] = []
    for turn in dialogue.turns:
        _check(dialogue.id, turn)
        # Compared as tokens and not as text: the learner has to score what the engine saw, bit for bit.
        if not samples or turn.prompt_ids[: len(samples[-1].token_ids)] != samples[-1].token_ids:
            samples.append(
                TurnSample(
                    token_ids=[],
                    loss_mask=[],
                    rollout_logprobs=[],
                    dialogue_id=dialogue.id,
                    group_id=dialogue.group_id,
                    turn_index=turn.index,
                )
            )
        _extend(samples[-1], turn)
    return [sample for sample in samples if any(sample.loss_mask)]


def _extend(sample: TurnSample, turn: Turn) -> None:
    # What the prompt adds to the row: the user's message and the template around it, which nobody sampled.
    context = turn.prompt_ids[len(sample.token_ids) :]
    sample.token_ids += context + turn.reply_ids
    sample.loss_mask += [False] * len(context) + [True] * len(turn.reply_ids)
    sample.rollout_logprobs += [0.0] * len(context) + turn.logprobs


def _check(dialogue_id: str, turn: Turn) -> None:
    where = f"dialogue {dialogue_id}, turn {turn.index}"
    if not turn.prompt_ids:
        raise ValueError(
            f"{where}: no prompt tokens; the first sampled token would have nothing to be predicted from"
        )
    if len(turn.logprobs) != len(turn.reply_ids):
        raise ValueError(f"{where}: {len(turn.logprobs)} log-probs for {len(turn.reply_ids)} sampled tokens")
    # An engine whose weights are broken answers nan; one such number would spoil the whole update.
    if not all(map(math.isfinite, turn.logprobs)):
        raise ValueError(f"{where}: a log-prob is not finite")
