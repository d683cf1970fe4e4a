"""Do the appraisers order hand-written replies as a person would? Prints the ordering accuracy per family.

    python -m benchmarks.sanity [--appraiser embedded|lexical|both] [--file tests/data/sanity_replies.yaml]

The file holds contexts (a situation, a hidden intent, a temperament, a history) with graded replies: 3 good,
2 mediocre, 1 bad, 0 hacking. Within a context good > mediocre > bad must hold for the change in emotion, and
every hacking reply must stay below every mediocre one. A family's accuracy is the share of its pairs in
order; besides, no hacking reply may gain emotion. The reference is the order of the hand-written grades: 1
is as graded, 0.5 is chance.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.dialogue import Message, Role
from rlver_dist.simulator.appraiser import AppraisalContext, Appraiser
from rlver_dist.simulator.rules.appraisal import EmbeddedAppraiser
from rlver_dist.simulator.rules.lexical import LexicalAppraiser

SANITY_FILE = Path(__file__).parent.parent / "tests" / "data" / "sanity_replies.yaml"
GOOD, MEDIOCRE, BAD, HACKING = 3, 2, 1, 0
APPRAISERS = {"embedded": EmbeddedAppraiser, "lexical": LexicalAppraiser}


@dataclass(kw_only=True, slots=True, frozen=True)
class GradedReply:
    """A reply with its expected grade and the change that the appraiser gave it."""

    family: str
    grade: int
    text: str
    change: float


@dataclass(kw_only=True, slots=True)
class SanityReport:
    """Ordering accuracy (0 to 1) and highest change by family; `accuracy` is over all pairs."""

    accuracy: float
    by_family: dict[str, float]
    highest: dict[str, float]
    mean: dict[str, float]
    gaining_hacks: list[GradedReply]


def seed_situations() -> dict[str, dict]:
    """All seed situations by id."""
    folder = resources.files("rlver_dist.data").joinpath("seeds")
    texts = [entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {situation["id"]: situation for text in texts for situation in yaml.safe_load(text)}


def make_persona(situation: dict, intent: str, temperament: str) -> Persona:
    """The persona of a sanity context: a seed situation with one of its intents."""
    scene = " ".join(
        [
            situation["cause"],
            *situation["timeline"],
            *situation["people"],
            *situation["failed"],
            situation["now"],
        ]
    )
    return Persona(
        id=f"{situation['id']}-{intent}-{temperament}",
        name="Sam",
        profile="",
        scene=scene,
        traits=(),
        temperament=Temperament(temperament),
        hidden_intent=HiddenIntent(intent),
        want=situation["wants"][intent],
        hides=situation["hides"],
        language="en",
        topic=situation["topic"],
        situation_id=situation["id"],
        opening=situation["openings"][temperament],
        facts=tuple(situation["facts"]),
    )


def make_context(persona: Persona, history: list[str], reply: str) -> AppraisalContext:
    """The reply at the end of a history that starts and ends with the user."""
    roles = (Role.USER, Role.ASSISTANT)
    messages = tuple(
        Message(role=roles[index % 2], text=text) for index, text in enumerate([*history, reply])
    )
    return AppraisalContext(
        persona=persona, messages=messages, acceptance=1.0, max_change=10.0, truncated=False
    )


def grade_contexts(appraiser: Appraiser, contexts: list[dict]) -> list[list[GradedReply]]:
    """Appraise every reply of every context."""
    situations = seed_situations()
    graded = []
    for entry in contexts:
        persona = make_persona(situations[entry["situation"]], entry["intent"], entry["temperament"])
        graded.append(
            [
                GradedReply(
                    family=reply["family"],
                    grade=reply["grade"],
                    text=reply["text"],
                    change=appraiser.appraise(make_context(persona, entry["history"], reply["text"])).change,
                )
                for reply in entry["replies"]
            ]
        )
    return graded


def ordered_pairs(replies: list[GradedReply]) -> Iterator[tuple[GradedReply, GradedReply]]:
    """Pairs (higher, lower) that a person would order so; bad and hacking replies are not compared."""
    for higher in replies:
        for lower in replies:
            if higher.grade > lower.grade and higher.grade != BAD:
                yield higher, lower


def report(graded: list[list[GradedReply]]) -> SanityReport:
    """Accuracy per family: a pair counts for the lower reply's family, and pairs of good replies also for
    `good`."""
    right: dict[str, list[bool]] = defaultdict(list)
    changes: dict[str, list[float]] = defaultdict(list)
    everything: list[bool] = []
    for replies in graded:
        for reply in replies:
            changes[reply.family].append(reply.change)
        for higher, lower in ordered_pairs(replies):
            in_order = higher.change > lower.change
            everything.append(in_order)
            for family in {higher.family, lower.family}:
                right[family].append(in_order)
    return SanityReport(
        accuracy=sum(everything) / len(everything),
        by_family={family: sum(values) / len(values) for family, values in sorted(right.items())},
        highest={family: max(values) for family, values in changes.items()},
        mean={family: sum(values) / len(values) for family, values in changes.items()},
        gaining_hacks=[
            reply for replies in graded for reply in replies if reply.grade == HACKING and reply.change > 0
        ],
    )


def main() -> None:
    """Command line: print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--appraiser", choices=[*APPRAISERS, "both"], default="both")
    parser.add_argument("--file", type=Path, default=SANITY_FILE)
    parser.add_argument("--mistakes", action="store_true", help="print every pair out of order")
    arguments = parser.parse_args()
    contexts = yaml.safe_load(arguments.file.read_text(encoding="utf-8"))
    for name in APPRAISERS if arguments.appraiser == "both" else [arguments.appraiser]:
        graded = grade_contexts(APPRAISERS[name](), contexts)
        found = report(graded)
        print(
            f"{name}: accuracy {found.accuracy:.3f}, {len(found.gaining_hacks)} hacking replies gain emotion"
        )
        for family, accuracy in found.by_family.items():
            print(
                f"  {family:18s} accuracy {accuracy:.3f}   change mean {found.mean[family]:+6.2f}  highest "
                f"{found.highest[family]:+6.2f}"
            )
        for reply in found.gaining_hacks:
            print(f"  gains {reply.change:+.2f}: {reply.text[:120]}")
        if arguments.mistakes:
            for index, replies in enumerate(graded):
                for higher, lower in ordered_pairs(replies):
                    if higher.change <= lower.change:
                        print(
                            f"  {index} {contexts[index]['intent']}: {higher.family} {higher.change:+.2f} "
                            f"{higher.text}\n"
                            f"     <= {lower.family} {lower.change:+.2f} {lower.text}"
                        )


if __name__ == "__main__":
    main()
