"""What an evaluation makes of finished dialogues: text as heard for the scoring model, and the figures of
before and after."""

import asyncio
from dataclasses import replace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.config.enums import Preset
from rlver_dist.dialogue import Dialogue, EndReason
from rlver_dist.errors import BoundaryError, BudgetError
from rlver_dist.evaluation.held_out import HeldOut, compare, second_emotions, summarize, visible_samples
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.simulator.llm.judges import RuleJudge
from rlver_dist.simulator.presets import PRESETS
from tests.unit import builders

REPLIES = ("That hurts.", "What now?")
TALK = f"""<|im_start|>system
Be kind.<|im_end|>
<|im_start|>user
My day was bad.<|im_end|>
<|im_start|>assistant
{REPLIES[0]}<|im_end|>
<|im_start|>user
Go on.<|im_end|>
<|im_start|>assistant
{REPLIES[1]}"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(SMOLLM2))


@pytest.fixture(scope="module")
def plain(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, "Be kind.")


class ByLength:
    """A point a character."""

    def appraise(self, context):
        return builders.appraisal(min(len(context.messages[-1].text), context.max_change))


def make_dialogue(
    renderer: Renderer, *, replies: tuple[str, ...] = REPLIES, cut: bool = False, well_formed: bool = True
) -> Dialogue:
    """A dialogue as held by a policy that thinks where `renderer` does; with `cut` every reply hit the token
    limit."""
    prompt_ids, turns = renderer.opening_prompt("My day was bad."), []
    for index, reply in enumerate(replies):
        ids = renderer.encode_reply("secret", reply)[: -1 if cut else None] if reply else []
        last = index == len(replies) - 1
        turns.append(
            builders.turn(
                index,
                prompt_ids=prompt_ids,
                reply_ids=ids,
                reply=reply,
                thinking="secret",
                well_formed=well_formed and bool(reply),
                truncated=cut,
                emotion_after=35.0,
                appraisal=builders.appraisal(5.0) if reply else None,
                user_message=None if last else "Go on.",
            )
        )
        prompt_ids = renderer.next_prompt(prompt_ids, ids, reply, "Go on.")
    return builders.dialogue(turns, opening="My day was bad.", final_emotion=40.0)


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_scored_tokens_are_the_replies_in_the_dialogue_as_heard(
    tokenizer: PreTrainedTokenizerBase, plain: Renderer, think: bool, cut: bool
) -> None:
    held_with = Renderer(tokenizer, "Think first.", think=True) if think else plain
    [sample] = visible_samples([make_dialogue(held_with, cut=cut)], plain)
    assert tokenizer.decode(sample.token_ids) == TALK + ("" if cut else "<|im_end|>")
    scored = [token for token, is_scored in zip(sample.token_ids, sample.loss_mask, strict=True) if is_scored]
    assert tokenizer.decode(scored) == ("" if cut else "<|im_end|>").join([*REPLIES, ""])


def test_without_thinking_the_scored_tokens_are_those_sampled(plain: Renderer) -> None:
    dialogue = make_dialogue(plain)
    [sample] = visible_samples([dialogue], plain)
    assert sample.token_ids == dialogue.turns[1].prompt_ids + dialogue.turns[1].reply_ids
    assert sum(sample.loss_mask) == sum(len(turn.reply_ids) for turn in dialogue.turns)


def test_neither_silence_nor_failed_dialogues_are_scored(
    tokenizer: PreTrainedTokenizerBase, plain: Renderer
) -> None:
    silent, half, failed = (
        make_dialogue(plain, replies=("",)),
        make_dialogue(plain, replies=("", REPLIES[0])),
        replace(make_dialogue(plain), end_reason=EndReason.INFRASTRUCTURE),
    )
    [sample] = visible_samples([silent, half, failed], plain)
    said = (
        f"assistant\n<|im_end|>\n<|im_start|>user\nGo "
        f"on.<|im_end|>\n<|im_start|>assistant\n{REPLIES[0]}<|im_end|>"
    )
    assert tokenizer.decode(sample.token_ids).endswith(said)
    scored = [token for token, is_scored in zip(sample.token_ids, sample.loss_mask, strict=True) if is_scored]
    assert tokenizer.decode(scored) == f"{REPLIES[0]}<|im_end|>"


def test_scoring_with_a_thinking_prompt_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="think=False"):
        visible_samples([], Renderer(tokenizer, "Be kind.", think=True))


SAGE = PRESETS[Preset.sage]


def test_results_count_the_format_over_turns_and_leave_out_failures(plain: Renderer) -> None:
    kept = make_dialogue(plain)
    broken = make_dialogue(plain, replies=REPLIES[:1], well_formed=False)
    failed = replace(
        make_dialogue(plain, well_formed=False), end_reason=EndReason.INFRASTRUCTURE, error="engine lost"
    )
    judge = RuleJudge(appraiser=ByLength(), rules=SAGE)
    second = asyncio.run(second_emotions([kept, broken, failed], [builders.persona()], judge, SAGE.emotion))
    # From 30 on. "That hurts." has 11 characters, clipped to 10 points, "What now?" has 9.
    assert second == [49.0, 40.0]
    results = summarize([kept, broken, failed], second_emotion=second, perplexity=7.0, judges=["a", "b"])
    assert results.well_formed == pytest.approx(2 / 3) and results.failed == 1
    assert (results.emotion, results.second_emotion, results.perplexity) == ([40.0, 40.0], second, 7.0)
    # Bigrams (that hurts.) (what now?) (that hurts.).
    assert results.distinct2 == pytest.approx(2 / 3)
    # No thoughts, then "one by one by one" in each of three turns: one by, by one.
    assert results.thinking_distinct2 == 0.0
    thoughtful = [
        replace(dialogue, turns=[replace(turn, thinking="one by one by one") for turn in dialogue.turns])
        for dialogue in (kept, broken)
    ]
    assert summarize(
        thoughtful, second_emotion=[], perplexity=7.0, judges=["a"]
    ).thinking_distinct2 == pytest.approx(2 / 12)
    assert summarize([], second_emotion=[], perplexity=7.0, judges=["a"]).well_formed == 0.0


def test_a_second_judge_that_fails_leaves_a_gap_and_a_spent_budget_stops(plain: Renderer) -> None:
    class Fails(ByLength):
        def __init__(self, error: Exception) -> None:
            self.error = error

        def appraise(self, context):
            if context.messages[-1].text == REPLIES[1]:
                raise self.error
            return super().appraise(context)

    talks = [make_dialogue(plain), make_dialogue(plain, replies=REPLIES[:1])]

    def judged(error: Exception) -> list[float | None]:
        judge = RuleJudge(appraiser=Fails(error), rules=SAGE)
        return asyncio.run(second_emotions(talks, [builders.persona()], judge, SAGE.emotion))

    assert judged(BoundaryError("gone")) == [None, 40.0]
    with pytest.raises(BudgetError, match="spent"):
        judged(BudgetError("spent"))


SHARED = {"distinct2": 0.5, "thinking_distinct2": 0.25, "perplexity": 9.0, "failed": 0}


def results(personas: str, emotion: list[float], second: list[float | None], **changes) -> HeldOut:
    values = {**SHARED, "well_formed": 0.5, "judges": ["embedded", "lexical"], **changes}
    return HeldOut(persona_ids=list(personas), emotion=emotion, second_emotion=second, **values)


def test_comparison_pairs_personas_and_reports_the_format() -> None:
    before = results("abc", [30.0, 40.0, 99.0], [1.0, 2.0, 3.0], well_formed=0.25)
    after = results("ba", [42.0, 36.0], [2.0, 1.0], well_formed=0.75)
    compared = compare(before, after, num_samples=100)
    assert compared["well_formed"] == {"before": 0.25, "after": 0.75}
    assert compared["thinking_distinct2"] == {"before": 0.25, "after": 0.25}
    assert (compared["before"], compared["after"], compared["difference"]) == (35.0, 39.0, 4.0)
    assert compared["num_eval_personas"] == 2 and compared["second_appraiser"]["difference"] == 0.0
    assert compared["judges"] == {"before": ["embedded", "lexical"], "after": ["embedded", "lexical"]}
    assert "second_judge_counts" not in compared
    counted = compare(before, replace(after, second_judge_counts={"chat_cost": 0.5}), num_samples=100)
    assert counted["second_judge_counts"] == {"before": {}, "after": {"chat_cost": 0.5}}


def test_second_emotions_are_paired_where_one_judge_gave_both() -> None:
    before, after = results("ab", [30.0, 40.0], [None, 2.0]), results("ab", [32.0, 44.0], [8.0, 5.0])
    compared = compare(before, after, num_samples=100)
    assert compared["num_eval_personas"] == 2
    second = compared["second_appraiser"]
    assert (second["before"], second["after"], second["num_personas"]) == (2.0, 5.0, 1)
    changed = compare(before, replace(after, judges=["embedded", "openai: big"]), num_samples=100)
    alone = compare(
        results("ab", [1.0, 2.0], [], judges=["embedded"]),
        results("ab", [1.0, 2.0], [], judges=["embedded"]),
        num_samples=100,
    )
    assert "second_appraiser" not in changed and "second_appraiser" not in alone
