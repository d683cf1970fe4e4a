"""Support strategies: which a sentence uses, and what each is worth to each hidden intent.

The strategies follow the helping-skills taxonomy of emotional support conversations (Liu et al. 2021,
arXiv:2106.01144, table 1), finer where the eight hidden intents (SAGE, arXiv:2505.02847, section 2.2) need
it, and with the ways to fail added. A sentence uses a strategy as far as it resembles one of the strategy's
hand-written example sentences (`prototypes.yaml`).
"""

from __future__ import annotations

from importlib import resources

import torch
import yaml

from rlver_dist.data.persona import HiddenIntent, Temperament
from rlver_dist.errors import DataError
from rlver_dist.simulator.rules.embedding import Encoded, SentenceEncoder, one_thread, similarities
from rlver_dist.simulator.rules.heads import StrategyHead
from rlver_dist.simulator.sentences import ramp
from rlver_dist.simulator.strategy import Strategy

_S = Strategy
SUPPORT = frozenset(list(Strategy)[: list(Strategy).index(_S.SELF_DISCLOSURE) + 1])
"""Strategies that help some users; the others are ways to fail."""
COMFORT = frozenset({_S.REFLECT_FEELING, _S.VALIDATE, _S.ABSOLVE, _S.PRESENCE})
"""Support that may name nothing of the matter and still be meant for the user; the rest counts only on the
user's own matter. Praise is of the rest: a compliment that would fit anybody ("your kind words ...") speaks
of nothing that this user did."""
_INTENTS = (
    HiddenIntent.BALANCED_VIEW,
    HiddenIntent.PRACTICAL_ADVICE,
    HiddenIntent.UNDERSTAND_OTHERS,
    HiddenIntent.SELF_REFLECTION,
    HiddenIntent.PRAISE,
    HiddenIntent.BE_HEARD,
    HiddenIntent.DEEP_EMPATHY,
    HiddenIntent.NO_FAULT,
)
# Worth of a strategy to each intent, by hand: 1 is what the user came for, below 0 what they came to escape.
# fmt: off
_ROWS: dict[Strategy, tuple[float, ...]] = {
    #                          balanced advice others self-r praise heard empathy no-fault
    _S.REFLECT_FEELING:        (0.35,  0.30,  0.35,  0.40,  0.40,  0.75,  0.95,  0.45),
    _S.RESTATE:                (0.40,  0.35,  0.40,  0.40,  0.40,  0.85,  0.65,  0.40),
    _S.VALIDATE:               (0.25,  0.30,  0.25,  0.15,  0.50,  0.60,  0.75,  0.75),
    _S.PRAISE_EFFORT:          (0.25,  0.25,  0.20,  0.30,  1.00,  0.40,  0.40,  0.45),
    _S.OPEN_QUESTION:          (0.40,  0.30,  0.40,  0.55,  0.25,  0.70,  0.45,  0.20),
    _S.ADVICE:                 (0.30,  1.00,  0.15,  0.20,  0.00, -0.35, -0.40,  0.00),
    _S.PERSPECTIVE:            (0.55,  0.25,  1.00,  0.35,  0.00, -0.05, -0.05,  0.30),
    _S.BALANCE:                (1.00,  0.35,  0.50,  0.55,  0.10,  0.00, -0.10,  0.10),
    _S.PROMPT_SELF_REFLECTION: (0.45,  0.15,  0.25,  1.00, -0.10, -0.10, -0.15, -0.45),
    _S.ABSOLVE:                (0.20,  0.20,  0.25,  0.05,  0.45,  0.40,  0.50,  1.00),
    _S.PRESENCE:               (0.10,  0.10,  0.10,  0.10,  0.20,  0.50,  0.60,  0.30),
    _S.SELF_DISCLOSURE:        (0.05,  0.05,  0.05,  0.10,  0.05,  0.00,  0.15,  0.10),
    _S.CONSOLATION:           (-0.30, -0.35, -0.30, -0.30, -0.25, -0.40, -0.55, -0.20),
    _S.DISMISS:               (-0.75, -0.75, -0.75, -0.75, -0.90, -1.00, -1.00, -0.80),
    _S.LECTURE:               (-0.65, -0.55, -0.60, -0.55, -0.80, -0.90, -0.90, -0.90),
    _S.BLAME:                 (-0.70, -0.80, -0.75, -0.60, -0.95, -1.00, -1.00, -1.00),
    _S.CHANGE_SUBJECT:        (-0.80, -0.80, -0.80, -0.80, -0.80, -1.00, -0.95, -0.80),
    _S.MACHINE_TALK:          (-0.70, -0.60, -0.70, -0.70, -0.80, -0.90, -0.90, -0.80),
    _S.FLATTERY:              (-0.45, -0.50, -0.45, -0.50, -0.35, -0.45, -0.50, -0.40),
    _S.SCORE_TALK:            (-1.00, -1.00, -1.00, -1.00, -1.00, -1.00, -1.00, -1.00),
}
# fmt: on
# Factors on the worth; 1 where none is named.
_TEMPERAMENT: dict[Temperament, dict[Strategy, float]] = {
    Temperament.NEGATIVE: {
        _S.PRESENCE: 0.8,
        _S.OPEN_QUESTION: 0.95,
        _S.VALIDATE: 1.1,
        _S.LECTURE: 1.25,
        _S.BLAME: 1.25,
        _S.CONSOLATION: 1.4,
        _S.DISMISS: 1.2,
    },
    Temperament.PASSIVE: {
        _S.ABSOLVE: 1.1,
        _S.PRAISE_EFFORT: 1.05,
        _S.PRESENCE: 1.1,
        _S.BLAME: 1.2,
        _S.CONSOLATION: 0.8,
    },
    Temperament.AVOIDANT: {
        _S.REFLECT_FEELING: 0.9,
        _S.PRESENCE: 1.1,
        _S.RESTATE: 1.05,
        _S.OPEN_QUESTION: 0.9,
        _S.CONSOLATION: 0.9,
    },
}


def fit(strategy: Strategy, intent: HiddenIntent, temperament: Temperament) -> float:
    """Worth (-1.5 to 1) of a strategy to a user with this hidden intent and temperament; positive worth is at
    most 1."""
    worth = _ROWS[strategy][_INTENTS.index(intent)] * _TEMPERAMENT[temperament].get(strategy, 1.0)
    return min(1.0, worth)


def load_prototypes() -> dict[Strategy, list[str]]:
    """The example sentences by strategy.

    Raises:
        DataError: the file names other strategies than `Strategy` does.
    """
    text = (
        resources.files("rlver_dist.simulator.rules").joinpath("prototypes.yaml").read_text(encoding="utf-8")
    )
    raw = yaml.safe_load(text)
    if set(raw) != {strategy.value for strategy in Strategy}:
        raise DataError(
            f"prototypes.yaml: strategies {sorted(raw)}; it must name exactly those of strategies.Strategy"
        )
    return {strategy: raw[strategy.value] for strategy in Strategy}


class StrategyRecognizer:
    """Activation (0 to 1) of every strategy in a sentence.

    Two kinds of evidence must agree: the strategy head's probability, which reads the manner, and the
    similarity to the nearest example sentence, which keeps a text far from all examples from exciting the
    head.
    """

    HELPING = (0.10, 0.60)
    """Head probability from which a supportive strategy counts, and at which it counts in full."""
    FAILING = (0.36, 0.80)
    """The same for the summed probability of all ways to fail, which then share the activation by their
    probabilities."""
    ALIKE = (0.10, 0.32)
    """The same for the similarity to the nearest example sentence."""
    OBVIOUS = (0.55, 0.80)
    """Similarity at which the examples alone suffice."""

    def __init__(self, encoder: SentenceEncoder, head: StrategyHead) -> None:
        self._head = head
        self._prototypes = {strategy: encoder.vectors(lines) for strategy, lines in load_prototypes().items()}

    def activations(self, sentence: Encoded) -> dict[Strategy, float]:
        """Activation of each strategy; similarities and probabilities are rounded before the rules."""
        with one_thread(), torch.inference_mode():
            logits = self._head(sentence.states[None], torch.ones(1, len(sentence.states)))[0]
            chances = logits.double().softmax(-1)
        # Not strict: the class behind the last strategy is "none of them".
        chance = {
            strategy: round(value, 4) for strategy, value in zip(Strategy, chances.tolist(), strict=False)
        }
        # The head tells failing from helping better than one way to fail from another, so all ways to fail
        # pass the threshold together and then share what comes of it.
        failing = sum(value for strategy, value in chance.items() if strategy not in SUPPORT)
        found = {}
        for strategy, rows in self._prototypes.items():
            alike = float(similarities(sentence.vector[None], rows).max())
            # `told` is the head's evidence, `alike` that of the examples.
            if strategy in SUPPORT:
                told = ramp(chance[strategy], *self.HELPING)
            else:
                told = ramp(failing, *self.FAILING) * chance[strategy] / max(failing, 1e-4)
            # A product, so that the head alone cannot be excited by a text far from all examples; a sentence
            # that is nearly an example needs no head.
            found[strategy] = max(told * ramp(alike, *self.ALIKE), ramp(alike, *self.OBVIOUS))
        return found
