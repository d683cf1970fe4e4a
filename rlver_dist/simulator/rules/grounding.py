"""Does a reply speak of this user's own matter, and in its own words?

Grounding counts what the user has said so far (and, less, what lies behind it: the scene); it takes both
meaning (embeddings) and names, sums and objects (content words). Handing the user's sentences back is
copying, not grounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Message, Role
from rlver_dist.simulator.rules.embedding import SentenceEncoder, similarities
from rlver_dist.simulator.sentences import content_words, ramp, sentences
from rlver_dist.text import overlap, words

MATTER = (0.15, 0.37)
"""Similarity to anything of the user's from which a sentence touches their matter, and at which it is about
it."""
# The user's sentence as the other side would say it back. One way only: "you" may be "I" or "me".
_SWAP = {
    "i": "you",
    "me": "you",
    "my": "your",
    "mine": "yours",
    "myself": "yourself",
    "i'm": "you're",
    "i've": "you've",
    "i'd": "you'd",
    "i'll": "you'll",
    "am": "are",
    "was": "were",
    "we": "you",
    "our": "your",
    "us": "you",
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Grounding:
    """Rounded measures of one reply, all 0 to 1.

    Attributes:
        heard: nearness in meaning to what the user has said.
        last: nearness to the user's last message.
        scene: nearness to the scene behind it.
        details: the user's own content words taken up, saturating at three.
        want: nearness to what the user secretly wants from this talk.
        copied: share of the reply's word 4-grams that stand in a user message.
        parroted: the same with the persons swapped (I, you).
    """

    heard: float
    last: float
    scene: float
    details: float
    want: float
    copied: float
    parroted: float

    @property
    def level(self) -> float:
        """How far the reply speaks of this user, 0 to 1."""
        meaning = max(
            ramp(self.heard, 0.22, 0.50), ramp(self.last, 0.20, 0.48), 0.8 * ramp(self.scene, 0.30, 0.55)
        )
        # Nearness in meaning alone earns half: general talk about the topic is near, too, and only the user's
        # own names, sums and objects show that somebody listened.
        return round(meaning * (0.5 + 0.5 * self.details), 4)


def nearness(encoder: SentenceEncoder, persona: Persona, messages: tuple[Message, ...]) -> list[float]:
    """How far each sentence of the last message is about the user's matter at all, 0 to 1 (rounded)."""
    texts = [message.text for message in messages[:-1] if message.role is Role.USER]
    heard = [sentence for text in texts for sentence in sentences(text)]
    # The scene and the want are not said yet. A reply that comes near them by itself is no stray one.
    around = encoder.vectors([*heard, *sentences(persona.scene), persona.want])
    own = encoder.vectors(sentences(messages[-1].text))
    return [round(ramp(value, *MATTER), 4) for value in similarities(own, around).max(dim=1).values.tolist()]


def _swapped(tokens: list[str]) -> list[str]:
    # Both sides are swapped, so that "my key" said back as "your key" is found whoever said which.
    return [_SWAP.get(token, token) for token in tokens]


def measure(encoder: SentenceEncoder, persona: Persona, messages: tuple[Message, ...]) -> Grounding:
    """Grounding of the last message of `messages` in the user's messages before it."""
    reply = messages[-1].text
    heard = [message.text for message in messages[:-1] if message.role is Role.USER]
    reply_sentences = sentences(reply)
    if not reply_sentences or not heard:
        return Grounding(heard=0.0, last=0.0, scene=0.0, details=0.0, want=0.0, copied=0.0, parroted=0.0)
    own = encoder.vectors(reply_sentences)

    def nearest(texts: list[str]) -> float:
        rows = encoder.vectors(texts)
        return round(float(similarities(own, rows).max()), 4) if len(rows) else 0.0

    # Stems of names, sums and objects. Three are enough to show that somebody listened; more would pay for
    # copying.
    user_words = set().union(*(content_words(text) for text in heard))
    taken_up = content_words(reply) & user_words
    tokens, heard_tokens = words(reply), [words(text) for text in heard]
    return Grounding(
        heard=nearest([sentence for text in heard for sentence in sentences(text)]),
        last=nearest(sentences(heard[-1])),
        scene=nearest(sentences(persona.scene)),
        details=round(min(1.0, len(taken_up) / 3), 4),
        want=nearest([persona.want]),
        copied=round(overlap(tokens, heard_tokens, 4), 4),
        parroted=round(overlap(_swapped(tokens), [_swapped(one) for one in heard_tokens], 4), 4),
    )
