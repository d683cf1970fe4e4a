"""The second appraiser: words alone, for checking that what training gained is not the first appraiser's
blind spot.

It shares no feature with `EmbeddedAppraiser`: no embedding, no example sentence, no trained head. Moves are
recognised by word patterns (`lexical_patterns.yaml`), grounding by TF-IDF over the seed situations, fluency
by a trigram model over word classes, repetition by compression. Training never sees it.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from functools import cache
from importlib import resources

import yaml

from rlver_dist.data.persona import HiddenIntent, Temperament
from rlver_dist.dialogue import Appraisal, Role
from rlver_dist.simulator import narration
from rlver_dist.simulator.appraiser import AppraisalContext
from rlver_dist.simulator.sentences import FUNCTION_WORDS, content_words, ramp, sentences
from rlver_dist.text import ngrams, overlap, plain, words

_I = HiddenIntent
WELCOME: dict[HiddenIntent, dict[str, float]] = {
    _I.BALANCED_VIEW: {
        "weigh": 1.0,
        "read_other": 0.5,
        "entitle": 0.2,
        "name_feeling": 0.3,
        "mirror": 0.4,
        "praise_deed": 0.3,
        "ask": 0.2,
    },
    _I.PRACTICAL_ADVICE: {"suggest": 1.0, "weigh": 0.2, "ask": 0.2, "entitle": 0.25, "name_feeling": 0.25},
    _I.UNDERSTAND_OTHERS: {"read_other": 1.0, "weigh": 0.4, "ask": 0.25, "name_feeling": 0.3, "entitle": 0.2},
    _I.SELF_REFLECTION: {"mirror": 1.0, "ask": 0.5, "weigh": 0.4, "name_feeling": 0.3, "read_other": 0.2},
    _I.PRAISE: {"praise_deed": 1.0, "entitle": 0.35, "name_feeling": 0.3, "acquit": 0.3, "ask": 0.1},
    _I.BE_HEARD: {"ask": 0.6, "name_feeling": 0.7, "stay": 0.7, "entitle": 0.5, "praise_deed": 0.25},
    _I.DEEP_EMPATHY: {"name_feeling": 0.95, "stay": 0.6, "entitle": 0.6, "ask": 0.25, "acquit": 0.3},
    _I.NO_FAULT: {"acquit": 1.0, "entitle": 0.5, "praise_deed": 0.35, "name_feeling": 0.3, "stay": 0.2},
}
"""Worth (0 to 1) of a move to a user with this hidden intent; moves left out are worth nothing."""
SUPPORT = frozenset(move for wanted in WELCOME.values() for move in wanted) - {"suggest", "ask"}
"""Moves that support even where they name nothing of the user's."""
UNWELCOME: dict[str, float] = {
    "brush_off": 0.55,
    "scold": 0.5,
    "accuse": 0.6,
    "drift": 0.6,
    "platitude": 0.4,
    "robot": 0.6,
    "gush": 0.3,
    "tally": 1.0,
}
"""Harm (0 to 1) of a move to any user."""
_PRESSING = frozenset({_I.BE_HEARD, _I.DEEP_EMPATHY, _I.PRAISE, _I.NO_FAULT})
RECOUNT = 0.7
"""Worth of the user's own story told back, to those who want feeling rather than a solution (half to the
others)."""
GAIN = 12.0
"""Points of full merit."""
UNMET = 1.0
"""Points that a turn costs in which nothing is met."""
HARM = 8.0
"""Points of full harm."""
COSTS: dict[str, float] = {
    "nonsense": 13.0,
    "squeezable": 10.0,
    "echo": 8.0,
    "sorry": 6.0,
    "emotive": 10.0,
    "odd_characters": 13.0,
    "parrot": 8.0,
    "list": 9.0,
    "long": 4.0,
    "quiz": 4.0,
    "stray": 4.0,
    "curt": 3.0,
    "cut": 1.0,
}
"""Points that each fault costs at full strength."""
ORDERED = (-1.2, -0.1)
"""Order score (`WordClassModel.order_score`) up to which words count as shuffled, and from which as
ordered."""
# Beginnings of feeling words, so that all their forms are found.
_EMOTIVE = re.compile(
    r"(?:pain|grie[fv]|sad|hurt|sorrow|lonel|heart|ang(?:er|ry)|fear|shame|guilt|tear|cry|love|empath|compass|understand|feel|emoti|suffer"
    r"|despair|hope|comfort|care|caring|overwhelm|frustrat|upset|depress|joy|happ|warm|gentle|tender|soul|ach(?:e|ing)|valid|support|hug|sympath)\w*"
)
# Unicode's categories of dashes, stops, quotes, currency signs and spaces.
_PROSE = frozenset({"Pd", "Po", "Pi", "Pf", "Sc", "Zs"})


def _word_class(word: str) -> str:
    if word in FUNCTION_WORDS:
        return word
    if word[0].isdigit():
        return "<num>"
    # An ending tells what a word does in a sentence; two letters or less before it make another word ("red").
    for suffix in ("ing", "ed", "ly", "s"):
        if word.endswith(suffix) and len(word) > len(suffix) + 2:
            return f"<{suffix}>"
    return "<word>"


SITUATIONS_READ = 4
"""First situations of each area of life that the statistics below are made of. The thresholds here were set
with these, so that further situations must not move what a reply is worth."""


@cache
def _seed_texts() -> tuple[str, ...]:
    """All prose of each of these situations as one text."""

    def prose(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in prose(item)]
        if isinstance(value, list):
            return [text for item in value for text in prose(item)]
        return [value] if isinstance(value, str) and " " in value else []

    folder = resources.files("rlver_dist.data").joinpath("seeds")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    files = [
        yaml.load(folder.joinpath(name).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        for name in names
    ]
    return tuple(
        "\n".join(prose(situation)) for situations in files for situation in situations[:SITUATIONS_READ]
    )


class WordClassModel:
    """Interpolated trigram model over word classes: function words stand for themselves, other words for
    their ending."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        # Counts of n-grams of one, two and three classes, and of what comes before their last one.
        self._counts: tuple[Counter[tuple[str, ...]], ...] = (Counter(), Counter(), Counter())
        for text in texts:
            for sentence in sentences_of(text):
                # Two marks before the first word, so that it has a context of two like all others.
                classes = ["<s>", "<s>", *map(_word_class, words(sentence))]
                for n in range(3):
                    # Each n-gram ends at a real word; the two marks before it are only its context.
                    self._counts[n].update(ngrams(classes[2 - n :], n + 1))
                    self._counts[n][("<s>",) * (n + 1)] += 1
        self._contexts: tuple[Counter[tuple[str, ...]], ...] = (Counter(), Counter(), Counter())
        for n in range(3):
            for gram, count in self._counts[n].items():
                self._contexts[n][gram[:-1]] += count

    def order_score(self, tokens: list[str]) -> float:
        """How surely the words stand in an order: (gain + 0.25) * sqrt(words), 0 between ordered and shuffled
        text.

        The gain is in nats a word: by how much the two words before explain a word's class better than its
        frequency does. It is about 0.2 for prose and -0.8 for shuffled words, and its noise falls with the
        root of the length.
        """
        classes = ["<s>", "<s>", *map(_word_class, tokens)]
        grams = ngrams(classes, 3)
        gains = [math.log(self._chance(gram) / self._frequency(gram[-1])) for gram in grams]
        # `fsum` is exact, so the score does not depend on the order of the words' gains.
        gain = math.fsum(gains) / max(1, len(grams))
        return (gain + 0.25) * math.sqrt(len(grams))

    def _frequency(self, word_class: str) -> float:
        # At least one count: a class that the seeds do not hold must not divide by 0.
        return max(self._counts[0][(word_class,)], 1) / self._contexts[0][()]

    def _chance(self, gram: tuple[str, ...]) -> float:
        # Never 0, since its logarithm is taken; the weights are the interpolation's, longest context most.
        chance = 1e-4
        for n, weight in enumerate((0.1, 0.4, 0.5)):
            part = gram[2 - n :]
            total = self._contexts[n][part[:-1]]
            chance += weight * self._counts[n][part] / total if total else 0.0
        return chance


def _oddness(written: str) -> float:
    """Share of characters beyond ASCII, invisible ones included, that are no punctuation of prose; as a
    fault, 0 to 1."""
    # The reply as it was written: what hides characters is a trick even where nobody sees them.
    strange = sum(not c.isascii() and unicodedata.category(c) not in _PROSE for c in written)
    return ramp(strange / len(written), 0.01, 0.08)


def sentences_of(text: str) -> list[str]:
    """Every sentence of a long text, line by line."""
    return [sentence for line in text.split("\n") for sentence in sentences(line)]


class TfIdf:
    """Bags of content-word stems, weighted by rarity over the seed situations."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._documents = len(texts)
        self._frequency = Counter(stem for text in texts for stem in content_words(text))

    def weight(self, stem: str) -> float:
        """Inverse document frequency, log((1 + N) / (1 + n))."""
        return math.log((1 + self._documents) / (1 + self._frequency[stem]))

    def covered(self, text: str, source: str) -> float:
        """Summed weight of the words that `text` takes from `source`."""
        # Sorted, since the order of a set of strings differs from process to process.
        return math.fsum(self.weight(stem) for stem in sorted(content_words(text) & content_words(source)))

    def cosine(self, left: str, right: str) -> float:
        """Cosine of two texts' binary TF-IDF vectors."""
        a = content_words(left)
        b = content_words(right)
        norm = math.sqrt(self._squares(a) * self._squares(b))
        return self._squares(a & b) / norm if norm else 0.0

    def _squares(self, stems: set[str]) -> float:
        return math.fsum(self.weight(stem) ** 2 for stem in sorted(stems))


class LexicalAppraiser:
    """Appraises by words alone; see the module's head."""

    def __init__(self) -> None:
        texts = _seed_texts()
        self._tfidf = TfIdf(texts)
        self._model = WordClassModel(texts)
        raw = yaml.safe_load(
            resources.files("rlver_dist.simulator.rules")
            .joinpath("lexical_patterns.yaml")
            .read_text(encoding="utf-8")
        )
        self._patterns = {
            move: [re.compile(pattern) for pattern in patterns] for move, patterns in raw.items()
        }

    def appraise(self, context: AppraisalContext) -> Appraisal:
        """Appraise the last message of `context`; an empty reply gets the largest negative change."""
        written = context.written
        context = context.heard()
        reply = plain(context.messages[-1].text)
        tokens = words(reply)
        if not tokens:
            return narration.silence(context.persona, context.max_change)
        persona = context.persona
        heard = [plain(message.text) for message in context.messages[:-1] if message.role is Role.USER]
        earlier = [plain(message.text) for message in context.messages[:-1] if message.role is Role.ASSISTANT]
        moves = self._moves(reply)
        support = max(moves[move] for move in sorted(SUPPORT))
        ground = self._grounding(reply, heard, persona.scene, persona.want)
        faults = self._faults(
            reply, tokens, heard, earlier, context.truncated and reply[-1:] not in ".!?", ground["level"]
        )
        faults["odd_characters"] = _oddness(written)
        # Comfort may name nothing of the matter and is meant for the user all the same.
        faults["stray"] *= 1.0 - 0.6 * support
        recount = RECOUNT * ground["level"] * ramp(sum(token.startswith("you") for token in tokens), 0, 2)
        worth = [weight * moves[move] for move, weight in WELCOME[persona.hidden_intent].items()]
        worth += [recount if persona.hidden_intent in _PRESSING else recount / 2, 0.6 * ground["want"]]
        # Advice harms those who came for feeling rather than for a solution.
        pushy = 0.25 * moves["suggest"] if persona.hidden_intent in _PRESSING else 0.0
        harm = 1.0 - (1.0 - pushy) * math.prod(
            1.0 - weight * moves[move] for move, weight in UNWELCOME.items()
        )
        # As in the first appraiser, but no single move earns more than three quarters: a pattern is weaker
        # evidence than an embedding.
        merit = 1.0 - math.prod(1.0 - 0.75 * value for value in worth)
        sound = (
            (1.0 - faults["nonsense"])
            * (1.0 - faults["parrot"])
            * (1.0 - faults["echo"])
            * (1.0 - faults["squeezable"])
        )
        gain = context.acceptance * GAIN * merit * (0.3 + 0.7 * ground["level"]) * sound
        # A user who attacks takes harm harder.
        sharper = 1.2 if persona.temperament is Temperament.NEGATIVE else 1.0
        cost = UNMET + sharper * HARM * harm + sum(weight * faults[name] for name, weight in COSTS.items())
        change = round(min(context.max_change, max(-context.max_change, gain - cost)), 2)
        named = {"merit": merit, "harm": harm}
        for kind, values in (("move", moves), ("grounding", ground), ("fault", faults)):
            named |= {f"{kind}_{name}": value for name, value in values.items()}
        noticed = ", ".join(move.replace("_", " ") for move, value in moves.items() if value >= 0.5)
        return Appraisal(
            content=f"Words I notice: {noticed or 'none that matter'}.",
            fit=narration.fit(persona.hidden_intent, merit, []),
            activity=narration.activity(persona.temperament, change),
            feeling=narration.feeling(change),
            change=change,
            features={name: round(value, 4) for name, value in named.items()},
        )

    def _moves(self, reply: str) -> dict[str, float]:
        """Strength of every move: 0.7 for one pattern hit, 1 from two."""
        text = reply.lower()
        strengths = (0.0, 0.7, 1.0)
        moves = {}
        for move, patterns in self._patterns.items():
            hits = sum(len(pattern.findall(text)) for pattern in patterns)
            moves[move] = strengths[min(2, hits)]
        return moves

    def _grounding(self, reply: str, heard: list[str], scene: str, want: str) -> dict[str, float]:
        """How far the reply's words are the user's (`level`), and those of the user's want."""
        # What the user has said counts more than what only the scene knows: the policy has heard the one and
        # can only guess the other.
        told = ramp(self._tfidf.covered(reply, " ".join(heard)), 1.5, 8.0)
        behind = ramp(self._tfidf.covered(reply, scene), 3.0, 14.0)
        return {"level": max(told, 0.85 * behind), "want": ramp(self._tfidf.covered(reply, want), 1.0, 9.0)}

    def _faults(
        self, reply: str, tokens: list[str], heard: list[str], earlier: list[str], cut: bool, level: float
    ) -> dict[str, float]:
        """Strength (0 to 1) of every fault named in `COSTS` that is in the words."""
        # zlib packs repetition of any kind, whole sentences and single letters alike, and knows no words.
        packed = len(zlib.compress(reply.lower().encode(), 9)) / max(1, len(reply.encode()))
        grammar = sum(token in FUNCTION_WORDS for token in tokens) / len(tokens)
        sorry = len(re.findall(r"\b(?:sorry|apolog\w+|forgive me)\b", reply.lower()))
        marks = len(
            re.findall(r"(?:^|[\s:;,(])\d{1,2}[.)]\s|^[^\S\n]*[-*\u2022]\s|\*\*", reply, re.MULTILINE)
        )
        order = self._model.order_score(tokens)
        return {
            "nonsense": max(
                (1.0 - ramp(order, *ORDERED)) * ramp(len(tokens), 4, 9),
                (1.0 - ramp(grammar, 0.15, 0.32)) * ramp(len(tokens), 3, 7),
            ),
            "squeezable": ramp(len(reply), 40, 120) * (1.0 - ramp(packed, 0.30, 0.52)),
            "echo": max((ramp(self._tfidf.cosine(reply, one), 0.45, 0.85) for one in earlier), default=0.0),
            "sorry": ramp(sorry, 1, 3),
            "emotive": ramp(
                sum(bool(_EMOTIVE.fullmatch(token)) for token in tokens) / len(tokens), 0.22, 0.45
            ),
            "parrot": ramp(overlap(tokens, [words(one) for one in heard], 5), 0.2, 0.6),
            "list": ramp(marks, 1, 4),
            "long": ramp(len(tokens), 85, 180),
            "quiz": ramp(reply.count("?"), 2, 5),
            "stray": 1.0 - ramp(level, 0.0, 0.15),
            "curt": 1.0 - ramp(len(tokens), 3, 9),
            "cut": float(cut),
        }
