"""The policy as the learner sees it: token ids of a packed row in, log-probs and entropies of chosen tokens
out.

The vocabulary projection runs only where a token is scored, and log-softmax and entropy are computed from its
output in float32 a few rows at a time, so that no float32 copy of the logits ever exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from rlver_dist.errors import ConfigError
from rlver_dist.experience.packing import PackedRow, Span
from rlver_dist.learner.attention import ATTENTION_NAME, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measure = Callable[[torch.Tensor, torch.Tensor, float], Any]
"""What is computed of logits `[S, V]`, targets `[S]` and the temperature."""
CHANGED_LOGITS = ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling")
"""Options of Hugging Face models by which scores or logits are bounded or scaled."""
ROWS_AT_ONCE = 32
"""Rows of logits that are held in float32 at a time; 32 rows of a 49k vocabulary stay in a CPU's cache."""


class LogprobAndEntropy(torch.autograd.Function):
    """Log-prob of a target and entropy of the whole distribution, softmax(logits / temperature), per row, in
    float32.

    With p = softmax(z), z = logits / temperature and H = -sum p log p:
    d log p_t / dz = onehot(t) - p, and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx, logits: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`logits` [S, V], `targets` [S] -> log-probs [S] and entropies [S], float32, in nats."""
        logprobs = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        entropies, normalisers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, len(targets), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            scaled = logits[rows].float() / temperature
            normaliser = scaled.logsumexp(dim=-1)
            logprobs[rows] = scaled.gather(-1, targets[rows, None]).squeeze(-1) - normaliser
            probs = (scaled - normaliser[:, None]).exp_()
            entropies[rows] = normaliser - torch.linalg.vecdot(probs, scaled)
            normalisers[rows] = normaliser
        ctx.save_for_backward(logits, targets, normalisers, entropies)
        ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        """Gradient with respect to `logits`, in their dtype."""
        logits, targets, normalisers, entropies = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for start in range(0, len(targets), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_softmax = (logits[rows].float() / ctx.temperature).sub_(normalisers[rows, None])
            probs = log_softmax.exp()
            weight = (
                log_softmax.add_(entropies[rows, None])
                .mul_(-grad_entropies[rows, None])
                .sub_(grad_logprobs[rows, None])
            )
            grad = probs.mul_(weight)
            grad.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None])
            grad_logits[rows] = grad.div_(ctx.temperature)
        return grad_logits, None, None


def hidden_states(
    backbone: torch.nn.Module, token_ids: torch.Tensor, position_ids: torch.Tensor, spans: list[Span]
) -> torch.Tensor:
    """Last hidden states `[T, H]` of one packed row; see `PolicyModel.forward`. `backbone` is a Hugging Face
    model without its head."""
    inputs = dict(input_ids=token_ids[None], position_ids=position_ids[None])
    return backbone(**inputs, attention_mask=None, use_cache=False, spans=spans).last_hidden_state[0]


class PolicyModel(torch.nn.Module):
    """A Hugging Face causal language model with a scoring forward pass over packed rows.

    Works for any model whose `base_model` hands keyword arguments through to its attention function and whose
    output embeddings are a linear layer (Llama, Qwen2 and their kin).
    """

    def __init__(self, model: PreTrainedModel, *, recompute: bool) -> None:
        """`recompute` trades activations for time in the backbone and in the vocabulary projection."""
        super().__init__()
        self.model: PreTrainedModel = model
        self.recompute = recompute
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        spans: list[Span],
        logit_index: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        measure: Measure = LogprobAndEntropy.apply,
    ) -> Any:
        """Score chosen tokens of one packed row.

        Args:
            token_ids: `[T]`.
            position_ids: `[T]`, each token's place in its own sample.
            spans: who attends to whom.
            logit_index: `[S]` indices into the row of the tokens that predict the scored ones.
            targets: `[S]` indices into the row of the tokens to score.
            temperature: divides the logits.
            measure: what is computed of each scored token's logits.

        Returns:
            What `measure` gives; by default log-probs `[S]` in nats and entropies `[S]` in nats of the
                distributions that the scored tokens were drawn from.
        """
        hidden, targets = (
            hidden_states(self.model.base_model, token_ids, position_ids, spans)[logit_index],
            token_ids[targets],
        )
        if not (self.recompute and torch.is_grad_enabled()):
            return self._head(hidden, targets, temperature, measure)
        # One call whatever the number of tokens: under ZeRO-3 each call gathers the head, and every rank has
        # to gather as often.
        return checkpoint(self._head, hidden, targets, temperature, measure, use_reentrant=False)

    def logits(self, row: PackedRow) -> torch.Tensor:
        """Logits `[S, V]` that predict the trained tokens of `row`; for a whole replica, outside of
        DeepSpeed."""
        hidden = hidden_states(self.model.base_model, row.token_ids, row.position_ids, row.spans)[
            row.logit_index
        ]
        return self.model.get_output_embeddings()(hidden)

    def _head(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, measure: Measure) -> Any:
        return measure(self.model.get_output_embeddings()(hidden), targets, temperature)


def load_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model from a Hugging Face folder or hub id, with packed attention.

    Raises:
        ConfigError: the model does more to its scores or logits than `PolicyModel` and
            `packed_causal_attention` do.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    register()
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION_NAME)
    for name in CHANGED_LOGITS:
        value = getattr(model.config, name, None)
        if value is not None and value != 1:
            raise ConfigError(
                f"model.path={path}: {name}={value} is not trained as the engines sample; use a model of "
                f"Llama's or Qwen2's kind"
            )
    return model
