"""Exact attention over a packed row, registered with transformers' attention interface.

A packed row holds several samples one after the other, or turns that branch off one history, and a token must
see the tokens of its own sample alone. transformers' own packed path builds a dense `[T, T]` mask and needs
`attention_mask=None` and `use_cache=False` to notice the packing at all; this function takes the row's spans
as a keyword that the model hands through to every layer, and needs no mask.

On GPUs in half precision the row goes through PyTorch's variable-length flash kernel; elsewhere each span
goes through `BlockwiseCausalAttention`, which on CPUs takes 0.4 times the time of PyTorch's kernel forward
and backward (bfloat16, 400 tokens).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from rlver_dist.experience.packing import Span

ATTENTION_NAME = "rlver_packed"
QUERY_BLOCK = 256
"""Queries that are scored together; keys after a block are never scored, so smaller blocks waste less and run
less evenly."""


def packed_causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    spans: list[Span],
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attend over one packed row: each span to its context as a whole and to itself causally.

    Args:
        module: the attention layer; unused, part of transformers' signature.
        query: `[1, Hq, T, D]`.
        key: `[1, Hkv, T, D]`, Hq a multiple of Hkv.
        value: `[1, Hkv, T, D]`.
        attention_mask: must be None; the spans are the mask.
        spans: who attends to whom; their lengths sum to T.
        dropout: must be 0.
        scaling: factor of the scores; None means 1 / sqrt(D).
        sliding_window: refused where a span and its context are longer.
        softcap: refused; a bound on the scores, of Gemma 2 and its kin.
        s_aux: refused; attention sinks, of gpt-oss.

    Returns:
        `[1, T, Hq, D]`, and None in place of the attention weights.

    Raises:
        ValueError: spans that do not cover the row, a mask, dropout, scores that are more than scaled, or a
            window shorter than a span with its context.
    """
    _check_spans(query, spans, sliding_window)
    if attention_mask is not None or dropout:
        raise ValueError("packed attention: takes neither a mask nor dropout")
    if softcap is not None or s_aux is not None:
        raise ValueError(
            "packed attention: a model with capped scores or attention sinks would be trained wrongly; use "
            "another model"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # The flash kernel knows half precision alone.
    has_flash = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    attend = _varlen if has_flash else _blockwise
    return attend(query[0], key[0], value[0], spans, scaling), None


def _blockwise(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: list[Span], scaling: float
) -> torch.Tensor:
    """One span after the other: `[H, T, D]` in, `[1, T, Hq, D]` out."""
    # split, not slices: its backward pass writes each span's gradient once into one tensor of the row's size.
    lengths = [span.length for span in spans]
    split = (heads.split(lengths, dim=1) for heads in (query, key, value))
    outputs = [
        BlockwiseCausalAttention.apply(
            queries, _visible(key, keys, span), _visible(value, values, span), scaling
        ).transpose(0, 1)
        for span, queries, keys, values in zip(spans, *split, strict=True)
    ]
    return torch.cat(outputs)[None]


def _check_spans(query: torch.Tensor, spans: list[Span], sliding_window: int | None) -> None:
    """Raise `ValueError` unless the spans cover the row, and the window, where there is one, covers each of
    them."""
    if query.shape[0] != 1 or sum(span.length for span in spans) != query.shape[2]:
        raise ValueError(
            f"packed attention: spans {spans} do not cover one row of shape {tuple(query.shape)}"
        )
    # A window that no span exceeds hides nothing.
    longest = max(span.context_length + span.length for span in spans)
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"packed attention: sliding window {sliding_window} is shorter than a sample of {longest} tokens"
        )


def _visible(row: torch.Tensor, own: torch.Tensor, span: Span) -> torch.Tensor:
    """`[H, context_length + length, D]`: the keys or values that a span attends to, of the whole `row`
    `[H, T, D]` and the span's `own` `[H, length, D]`."""
    if span.context_length == 0:
        return own
    return torch.cat([row.narrow(1, span.context_start, span.context_length), own], dim=1)


@lru_cache(maxsize=4)
def _varlen_plan(
    spans: tuple[Span, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """First query and first key of each span, cumulated, and the row index of each key; None where the keys
    are the row itself.

    Cached, since every layer asks for the plan of the same row.
    """
    query_starts = [0]
    key_starts = [0]
    gathered: list[int] = []
    start = 0
    for span in spans:
        # The kernel wants each span's keys in one piece: its context's, which stand elsewhere in the row and
        # may be those of other spans too, then its own.
        gathered += range(span.context_start, span.context_start + span.context_length)
        gathered += range(start, start + span.length)
        start += span.length
        query_starts.append(start)
        key_starts.append(len(gathered))
    return (
        torch.tensor(query_starts, device=device, dtype=torch.int32),
        torch.tensor(key_starts, device=device, dtype=torch.int32),
        torch.tensor(gathered, device=device) if len(gathered) > start else None,
    )


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: list[Span], scaling: float
) -> torch.Tensor:
    """PyTorch's variable-length flash attention, one kernel for the whole row: `[H, T, D]` in, `[1, T, Hq,
    D]` out."""
    from torch.nn.attention.varlen import varlen_attn

    query_starts, key_starts, gathered = _varlen_plan(tuple(spans), query.device)
    query = query.transpose(0, 1).contiguous()
    key = key.transpose(0, 1).contiguous()
    value = value.transpose(0, 1).contiguous()
    if gathered is not None:
        # index_select adds up, in the backward pass, what several spans do to a context that they share.
        key = key.index_select(0, gathered)
        value = value.index_select(0, gathered)
    most_queries = max(span.length for span in spans)
    most_keys = max(span.context_length + span.length for span in spans)
    # Flash attention's causal mask ends at the bottom right: the last query sees every key, so keys in front
    # are seen by all queries.
    output = varlen_attn(
        query,
        key,
        value,
        query_starts,
        key_starts,
        most_queries,
        most_keys,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


class BlockwiseCausalAttention(torch.autograd.Function):
    """Causal attention with grouped queries, a block of queries at a time, scores and softmax in float32.

    The queries are those of the last Lq of Lk tokens, so that each sees the Lk - Lq tokens in front of them
    and itself.

    With P = softmax(S), S = scaling * Q K^T and O = P V (FlashAttention-2, arXiv:2307.08691, section 2.2):
    dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(dO * O)), dQ = scaling * dS K, dK = scaling * dS^T Q.
    P is kept for the backward pass: up to `[Hq, Lq, Lk]` numbers in the inputs' dtype.
    """

    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attend; `ctx` takes what `backward` needs.

        Args:
            ctx: autograd's.
            query: `[Hq, Lq, D]`.
            key: `[Hkv, Lk, D]`, Lk at least Lq and Hq a multiple of Hkv.
            value: `[Hkv, Lk, D]`.
            scaling: factor of the scores.

        Returns:
            `[Hq, Lq, D]` in the query's dtype.
        """
        num_heads, length, _ = query.shape
        num_kv_heads = key.shape[0]
        in_front = key.shape[1] - length
        output = query.new_empty(query.shape)
        scored_keys = key.float().transpose(1, 2)
        blocks = []
        # A block is scored against the keys up to its own end: half of all scores are never computed.
        for start in range(0, length, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, length)
            future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu(1)
            seen = in_front + stop
            scores = torch.bmm(_fold(query, start, stop, num_kv_heads).float(), scored_keys[..., :seen])
            scores.mul_(scaling)
            # Keys before the block are in every query's past: only the square on the diagonal needs a mask.
            diagonal = scores.view(num_heads, stop - start, seen)[..., in_front + start :]
            diagonal.masked_fill_(future, -math.inf)
            probs = scores.softmax(dim=-1).to(query.dtype)
            output[:, start:stop] = torch.bmm(probs, value[:, :seen]).view(num_heads, stop - start, -1)
            blocks.append(probs)
        ctx.save_for_backward(query, key, value, output, *blocks)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """Gradients of query, key and value.

        Args:
            ctx: autograd's.
            grad_output: `[Hq, Lq, D]`.

        Returns:
            `[Hq, Lq, D]`, `[Hkv, Lk, D]` and `[Hkv, Lk, D]` in the inputs' dtype, and None for the scaling.
        """
        query, key, value, output, *blocks = ctx.saved_tensors
        num_kv_heads = key.shape[0]
        grad_query = query.new_empty(query.shape)
        # Every block adds to the keys before it, so these two are summed in float32 and rounded once.
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        row_sums = (grad_output.float() * output.float()).sum(dim=-1, keepdim=True).to(query.dtype)
        # rowsum(dO * O) is what the softmax's own gradient takes off each row; it needs no probabilities.
        for index, probs in enumerate(blocks):
            start = index * QUERY_BLOCK
            stop = min(start + QUERY_BLOCK, query.shape[1])
            block_query = _fold(query, start, stop, num_kv_heads)
            block_grad = _fold(grad_output, start, stop, num_kv_heads)
            block_sums = _fold(row_sums, start, stop, num_kv_heads)
            seen = key.shape[1] - query.shape[1] + stop
            grad_value[:, :seen] += torch.bmm(probs.transpose(1, 2), block_grad)
            grad_scores = (
                torch.bmm(block_grad, value[:, :seen].transpose(1, 2))
                .sub_(block_sums)
                .mul_(probs)
                .mul_(ctx.scaling)
            )
            grad_query[:, start:stop] = torch.bmm(grad_scores, key[:, :seen]).view(
                query.shape[0], stop - start, -1
            )
            grad_key[:, :seen] += torch.bmm(grad_scores.transpose(1, 2), block_query)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _fold(heads: torch.Tensor, start: int, stop: int, num_kv_heads: int) -> torch.Tensor:
    """Rows `start` to `stop` of `[Hq, L, D]` as `[Hkv, group * rows, D]`, so that a group's queries share one
    product with its key."""
    return heads[:, start:stop].reshape(num_kv_heads, -1, heads.shape[-1])


def register() -> None:
    """Make `attn_implementation=ATTENTION_NAME` known to transformers in this process.

    Only the attention function is registered and no mask function: transformers then builds no mask at all.
    """
    # Imported late: importing transformers takes seconds, which a process that only reads this module saves.
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, packed_causal_attention)
