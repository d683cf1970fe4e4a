"""Whether CPU time grows in proportion to the input: what reads replies, and what credits an iteration.

    python -m benchmarks.growth

Each case runs at a size and at 16 times that size. Prints the CPU seconds of both (the least of five tries,
so that waiting does not count) and their ratio: 16 is in proportion, 256 is the square, and what is above 64
is named.
"""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.sanity import make_context, make_persona, seed_situations
from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import AlgorithmName
from rlver_dist.dialogue import Dialogue, EndReason, Turn
from rlver_dist.experience import guards
from rlver_dist.experience.credit import ppo_credit
from rlver_dist.experience.samples import TurnSample
from rlver_dist.simulator.appraiser import MAX_READ_CHARS
from rlver_dist.simulator.llm.fence import fence
from rlver_dist.simulator.rules import penalties
from rlver_dist.simulator.rules.lexical import LexicalAppraiser

TIMES = 16
NEAR_SQUARE = 4 * TIMES
"""Growth above this is nearer to the square of the input's than to the input's own."""
FENCED = ("<thought>", "<think>a</think>", "</reason>", "<think a=", "<reason></thought>", "\u0301\u0316")
PENALISED = ("\n", " \n", "- \n", "a\n \n", "mood ", "\u0301\u0316")
APPRAISED = ("what you want ", "i wonder what you ", "nothing is ever your ", "mood ", "\n", " \n")
HEARD = ["A guy I was seeing has gone quiet, it happens to everybody. I've still got his key and so on."]
TOKENS_A_TURN = 300


def fence_text(unit: str, size: int) -> Callable[[], object]:
    """The fence over a reply of `size` units."""
    text = "a" + unit * size
    return lambda: fence(text, max_bytes=10**6)


def penalties_of(unit: str, size: int) -> Callable[[], object]:
    """All penalties of a reply of `size` units."""
    text = "a" + unit * size + "b"
    return lambda: penalties.measure(text, [], HEARD, False, written=text)


def appraised(judge: LexicalAppraiser, unit: str, size: int) -> Callable[[], object]:
    """A whole appraisal by words of a reply of `size` characters, none of which are cut off."""
    persona = make_persona(seed_situations()["key-to-the-third-floor"], "practical_advice", "avoidant")
    context = make_context(persona, [persona.opening], ("a" + unit * size)[:size])
    return lambda: judge.appraise(context)


def guarded(size: int) -> Callable[[], object]:
    """The guards' measures of `size` dialogues of 8 replies of 60 words."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices(string.ascii_lowercase, k=5)) for _ in range(3000)]
    dialogues = [
        talk(str(index), [draw.choices(vocabulary, k=60) for _ in range(8)]) for index in range(size)
    ]
    return lambda: guards.measure(dialogues)


def talk(number: int, replies: list[list[str]]) -> Dialogue:
    """A dialogue with these replies; four in a row have one user."""
    turns = [
        Turn(
            index=index,
            prompt_ids=[1],
            reply_ids=[2],
            logprobs=[-1.0],
            reply=" ".join(words),
            thinking="",
            well_formed=True,
            truncated=False,
            emotion_before=30.0,
            emotion_after=30.0,
            appraisal=None,
            user_message="Go on.",
            policy_version=(0, 0),
        )
        for index, words in enumerate(replies)
    ]
    return Dialogue(
        id=str(number),
        persona_id=str(number // 4),
        group_id=str(number // 4),
        seed=1,
        opening="Hello.",
        start_emotion=30.0,
        turns=turns,
        end_reason=EndReason.MAX_TURNS,
        final_emotion=50.0,
    )


def credited(size: int) -> Callable[[], object]:
    """PPO's advantages and returns over `size` turns, 8 a dialogue."""
    zeros = torch.zeros(TOKENS_A_TURN)
    samples = [
        TurnSample(
            token_ids=[1] * (TOKENS_A_TURN + 1),
            loss_mask=[False] + [True] * TOKENS_A_TURN,
            rollout_logprobs=[0.0] + [-1.0] * TOKENS_A_TURN,
            dialogue_id=str(index // 8),
            group_id=str(index // 8),
            turn_index=index % 8,
        )
        for index in range(size)
    ]
    algorithm = AlgorithmConfig(name=AlgorithmName.ppo, group_size=1, gae_lambda=0.9)
    columns = [zeros] * size
    return lambda: ppo_credit(samples, algorithm, columns, columns, None, kl_coef=0.0)


def cases() -> Iterator[tuple[str, int, Callable[[int], Callable[[], object]]]]:
    """Name, smaller size, and what makes the work of a size."""
    for unit in FENCED:
        yield f"fence {unit!r}", 500, lambda size, unit=unit: fence_text(unit, size)
    for unit in PENALISED:
        yield f"penalties {unit!r}", 500, lambda size, unit=unit: penalties_of(unit, size)
    judge = LexicalAppraiser()
    for unit in APPRAISED:
        smaller = MAX_READ_CHARS // TIMES
        yield f"lexical appraiser {unit!r}", smaller, lambda size, unit=unit: appraised(judge, unit, size)
    yield "guards, dialogues", 64, guarded
    yield "credit, turns", 1000 // TIMES, credited


def least_seconds(work: Callable[[], object]) -> float:
    """Seconds of this process, the least of five tries."""
    taken = []
    for _ in range(5):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def main() -> None:
    """Command line: measure and print the table."""
    print(f"{'case':<44} {'size':>6} {'s':>9} {f's at {TIMES}x':>9} {'ratio':>7}")
    for name, size, prepare in cases():
        small = least_seconds(prepare(size))
        large = least_seconds(prepare(TIMES * size))
        ratio = large / max(small, 1e-9)
        note = "  nearer to the square" if ratio > NEAR_SQUARE else ""
        print(f"{name:<44} {size:>6} {small:>9.5f} {large:>9.5f} {ratio:>7.1f}{note}", flush=True)


if __name__ == "__main__":
    main()
