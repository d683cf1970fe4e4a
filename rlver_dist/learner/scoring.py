"""The policy as the learner sees it: token ids of a packed row in, log-probs and entropies of chosen tokens
out.

The vocabulary projection runs only where a token is scored, and log-softmax and entropy are computed from its
output in float32 a few rows at a time, so that no float32 copy of the logits ever exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from rlver_dist.errors import ConfigError
from rlver_dist.experience.packing import PackedRow, Span
from rlver_dist.learner.attention import ATTENTION_NAME, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measured = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""`[S]` each, float32: one number a scored token, or two."""
Measure = Callable[[torch.Tensor, torch.Tensor, float], Measured]
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
        entropies = torch.empty_like(logprobs)
        normalisers = torch.empty_like(logprobs)
        # A few rows at a time: a float32 copy of all logits would be the largest tensor of the update.
        for start in range(0, len(targets), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            scaled = logits[rows].float() / temperature
            normaliser = scaled.logsumexp(dim=-1)
            logprobs[rows] = scaled.gather(-1, targets[rows, None]).squeeze(-1) - normaliser
            probs = (scaled - normaliser[:, None]).exp_()
            # H = logsumexp(z) - sum p z, which takes no logarithm of p.
            entropies[rows] = normaliser - torch.linalg.vecdot(probs, scaled)
            normalisers[rows] = normaliser
        # The logits in their own dtype, not the float32 probabilities, which would take twice the memory in
        # bfloat16: the backward pass computes those again from the normalisers.
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
            # -p (log p + H) dH - p dlogp_t = p * weight; onehot(t) dlogp_t is added to it at the target.
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
    """Last hidden states of one packed row.

    Args:
        backbone: a Hugging Face model without its head.
        token_ids: `[T]`.
        position_ids: `[T]`, each token's place in its own sample.
        spans: who attends to whom.

    Returns:
        `[T, H]` in the model's dtype.
    """
    # The spans are the mask; a cache would keep every layer's keys and values for nothing.
    output = backbone(
        input_ids=token_ids[None],
        position_ids=position_ids[None],
        attention_mask=None,
        use_cache=False,
        spans=spans,
    )
    return output.last_hidden_state[0]


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
            # The reentrant kind drops the gradients of layers whose input requires none, as behind frozen
            # embeddings (LoRA).
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
    ) -> Measured:
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
        # Only the tokens that are scored go through the vocabulary projection, the widest layer by far.
        hidden = hidden_states(self.model.base_model, token_ids, position_ids, spans)[logit_index]
        target_ids = token_ids[targets]
        if not (self.recompute and torch.is_grad_enabled()):
            return self._head(hidden, target_ids, temperature, measure)
        # One call whatever the number of tokens: under ZeRO-3 each call gathers the head, and every rank has
        # to gather as often.
        return checkpoint(self._head, hidden, target_ids, temperature, measure, use_reentrant=False)

    def logits(self, row: PackedRow) -> torch.Tensor:
        """Logits that predict the trained tokens of `row`, `[S, V]` in the model's dtype; for a whole
        replica, outside of DeepSpeed."""
        hidden = hidden_states(self.model.base_model, row.token_ids, row.position_ids, row.spans)
        return self.model.get_output_embeddings()(hidden[row.logit_index])

    def _head(
        self, hidden: torch.Tensor, target_ids: torch.Tensor, temperature: float, measure: Measure
    ) -> Measured:
        return measure(self.model.get_output_embeddings()(hidden), target_ids, temperature)


def load_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model from a Hugging Face folder or hub id, with packed attention.

    Args:
        path: the folder or id.
        dtype: format of the weights.

    Raises:
        ConfigError: the model does more to its scores or logits than `PolicyModel` and
            `packed_causal_attention` do.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    register()
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION_NAME)
    # A log-prob that leaves out what the engine does to its logits would be off for every token, unnoticed.
    for name in CHANGED_LOGITS:
        value = getattr(model.config, name, None)
        if value is not None and value != 1:
            raise ConfigError(
                f"model.path={path}: {name}={value} is not trained as the engines sample; use a model of "
                f"Llama's or Qwen2's kind"
            )
    return model
