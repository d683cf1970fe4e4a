"""The embedded appraiser: rules on sentence embeddings, without a language model.

The change in emotion is made from the recorded features alone (`change_from`):

    merit  = 1 - (1 - WANT * want) * prod over strategies with positive fit of (1 - fit * activation)
    harm   = 1 - prod over strategies with negative fit of (1 - |fit| * activation)
    gain   = acceptance * GAIN * merit * (UNGROUNDED + (1 - UNGROUNDED) * grounding)
             * fluency * freshness * sincerity
    cost   = UNMET + HARM * harm + OFF_TOPIC * stray + GIBBERISH * (1 - fluency) + penalties
    value  = gain - cost
    change = min(value, max_change) where value >= 0,
             else -max_change * (1 - exp(value / (LEVELLING * max_change)))

So a reply that does nothing costs `UNMET` points, kindness that could be said to anybody earns little, and
what is not language, has been said before, is laid on thick or is handed back earns nothing. The loss levels
off smoothly, so that of two bad replies the less bad one still scores higher. Strategies that need a matter
(advice, a question) count only in sentences that are near the user's matter.
"""

from __future__ import annotations

import math
from dataclasses import asdict

import torch

from rlver_dist.dialogue import Appraisal, Role
from rlver_dist.simulator import narration
from rlver_dist.simulator.appraiser import AppraisalContext
from rlver_dist.simulator.rules import grounding, penalties
from rlver_dist.simulator.rules.embedding import SentenceEncoder, similarities
from rlver_dist.simulator.rules.fluency import reply_fluency
from rlver_dist.simulator.rules.heads import load_heads
from rlver_dist.simulator.rules.strategies import COMFORT, SUPPORT, StrategyRecognizer, fit
from rlver_dist.simulator.sentences import ramp, sentences
from rlver_dist.simulator.strategy import Strategy

GAIN = 12.0
"""Points of a reply that meets the hidden intent fully and speaks of this user."""
UNMET = 1.0
"""Points that a turn costs in which nothing is met."""
HARM = 7.0
"""Points that a fully harmful reply costs."""
UNGROUNDED = 0.25
"""Share of merit that counts where nothing in the reply is about this user."""
WANT = 0.5
"""Share of full merit that nearness to the user's own want can earn alone."""
GIBBERISH = 14.0
"""Points that a reply without any fluency costs."""
LEVELLING = 1.6
"""How slowly losses level off: a net cost of this many `max_change` loses 63 % of it."""
OFF_TOPIC = 4.5
"""Points that a reply costs that is not about the user's matter and comforts nobody."""
WANTED = (0.30, 0.62)
"""Similarity to the user's own want from which a reply begins to meet it, and at which it does."""
SAID_BEFORE = (0.70, 0.92)
"""Similarity to a sentence of an earlier reply from which a sentence begins to be stale, and at which it
is."""
PARROTED = (0.30, 0.80)
"""Share of the user's own words, persons swapped, from which a reply begins to be an echo, and at which it
earns nothing."""
NAMED_STRATEGY = 0.25
"""Activation from which a strategy is named in the appraisal's words."""
NAMED_FAULT = 1.5
"""Points that a fault costs from which it is named in them."""


def change_from(features: dict[str, float], acceptance: float, max_change: float) -> float:
    """Change of emotion, by the formula at the head of this module.

    It reads the rounded features alone, so that a recorded appraisal can be checked from its record.

    Args:
        features: `Appraisal.features` of an embedded appraisal.
        acceptance: difficulty, 0 to 1; scales the gain and never the cost.
        max_change: points.

    Returns:
        Points, rounded to two decimals.
    """
    counted = UNGROUNDED + (1.0 - UNGROUNDED) * features["grounding"]
    # A product, so that what is missing altogether (sense, novelty, sincerity) cannot be made up for by more
    # of the rest. Costs are a sum, so that each fault shows however many there are.
    gain = (
        acceptance
        * GAIN
        * features["merit"]
        * counted
        * features["fluency"]
        * features["freshness"]
        * features["sincerity"]
    )
    cost = (
        UNMET
        + HARM * features["harm"]
        + OFF_TOPIC * features["stray"]
        + GIBBERISH * (1.0 - features["fluency"])
    )
    cost += sum(weight * features[f"penalty_{name}"] for name, weight in penalties.WEIGHTS.items())
    value = gain - cost
    if value >= 0:
        return round(min(max_change, value), 2)
    # Clipped, all bad replies would cost the same, and GRPO could not tell a bad one from a worse one.
    return round(-max_change * (1.0 - math.exp(value / (LEVELLING * max_change))), 2)


class EmbeddedAppraiser:
    """The appraiser of training and evaluation: strategies, grounding, fluency and penalties on MiniLM
    embeddings."""

    def __init__(self) -> None:
        self._encoder = SentenceEncoder()
        self._fluency, strategy_head = load_heads(len(Strategy) + 1)
        self._recognizer = StrategyRecognizer(self._encoder, strategy_head)

    def appraise(self, context: AppraisalContext) -> Appraisal:
        """Appraise the last message of `context`; a reply without a word gets the largest negative change."""
        written = context.written
        context = context.heard()
        if not sentences(context.messages[-1].text):
            return narration.silence(context.persona, context.max_change)
        features = self._features(context, written)
        change = change_from(features, context.acceptance, context.max_change)
        persona = context.persona
        used = sorted(
            (s for s in Strategy if features[f"strategy_{s.value}"] >= NAMED_STRATEGY),
            key=lambda s: -features[f"strategy_{s.value}"],
        )
        costs = {name: weight * features[f"penalty_{name}"] for name, weight in penalties.WEIGHTS.items()}
        # Gibberish costs by the formula and not as a penalty, but it is a fault to be named like them.
        costs["gibberish"] = GIBBERISH * (1.0 - features["fluency"])
        faults = sorted(
            (name for name, cost in costs.items() if cost >= NAMED_FAULT), key=lambda name: -costs[name]
        )
        return Appraisal(
            content=narration.content(used, features["grounding"]),
            fit=narration.fit(persona.hidden_intent, features["merit"], faults),
            activity=narration.activity(persona.temperament, change),
            feeling=narration.feeling(change),
            change=change,
            features=features,
        )

    def _features(self, context: AppraisalContext, written: str) -> dict[str, float]:
        """Every number that the change follows from; `context` is as heard."""
        reply = context.messages[-1].text
        persona = context.persona
        earlier = [message.text for message in context.messages[:-1] if message.role is Role.ASSISTANT]
        heard = [message.text for message in context.messages[:-1] if message.role is Role.USER]
        # One sentence at a time: the strategies of a reply are those of its sentences, and a mean over all of
        # them would show none.
        encoded = [self._encoder.encode(sentence) for sentence in sentences(reply)]
        near = grounding.nearness(self._encoder, persona, context.messages)
        found = [
            self._on_matter(self._recognizer.activations(one), level)
            for one, level in zip(encoded, near, strict=True)
        ]
        comfort = [max(one[s] for s in COMFORT) for one in found]
        # The strongest sentence counts, not their sum: saying a kind thing five times is no more than saying
        # it once.
        strategy = {s: max(one[s] for one in found) for s in Strategy}
        worth = {s: fit(s, persona.hidden_intent, persona.temperament) * strategy[s] for s in Strategy}
        ground = grounding.measure(self._encoder, persona, context.messages)
        cost = penalties.measure(reply, earlier, heard, context.truncated, written=written)
        # Two kinds of evidence for one fault; the head knows flattery by manner, the penalty by its words.
        thick = max(strategy[Strategy.FLATTERY], cost["superlatives"])
        # Noisy-or: each strategy takes its part of what is still unmet, so several together do more than one
        # and never more than 1.
        unmet = math.prod(1.0 - value for value in worth.values() if value > 0)
        unharmed = math.prod(1.0 - min(1.0, -value) for value in worth.values() if value < 0)
        off_matter = [(1.0 - level) * (1.0 - kind) for level, kind in zip(near, comfort, strict=True)]
        features = {
            "merit": 1.0 - (1.0 - WANT * ramp(ground.want, *WANTED)) * unmet,
            "harm": 1.0 - unharmed,
            "grounding": ground.level,
            "stray": sum(off_matter) / len(near),
            "fluency": reply_fluency(self._fluency, encoded, context.truncated),
            "freshness": self._freshness([one.vector for one in encoded], earlier),
            "sincerity": (1.0 - thick) * (1.0 - ramp(max(ground.copied, ground.parroted), *PARROTED)),
        }
        features |= {f"strategy_{s.value}": value for s, value in strategy.items()}
        features |= {f"grounding_{name}": value for name, value in asdict(ground).items()}
        features |= {f"penalty_{name}": value for name, value in cost.items()}
        return {name: round(value, 4) for name, value in features.items()}

    @staticmethod
    def _on_matter(activations: dict[Strategy, float], near: float) -> dict[Strategy, float]:
        """Activations of a sentence, where support other than comfort counts as far as the sentence is near
        the user's matter."""
        bound = SUPPORT - COMFORT
        return {
            strategy: value * near if strategy in bound else value for strategy, value in activations.items()
        }

    def _freshness(self, own: list[torch.Tensor], earlier: list[str]) -> float:
        """Share of the reply's sentences that no earlier reply has said already, paraphrases included."""
        # By meaning, not by words: a policy that learns to rephrase one good line gains nothing.
        past = self._encoder.vectors([sentence for text in earlier for sentence in sentences(text)])
        if not len(past):
            return 1.0
        nearest = similarities(torch.stack(own), past).max(dim=1).values.tolist()
        return sum(1.0 - ramp(value, *SAID_BEFORE) for value in nearest) / len(nearest)
