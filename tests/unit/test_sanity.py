"""The appraisers order the hand-written sanity replies, and no trick gains emotion."""

import pytest
import yaml

from benchmarks.sanity import SANITY_FILE, GradedReply, grade_contexts, ordered_pairs, report
from rlver_dist.simulator.rules.appraisal import EmbeddedAppraiser
from rlver_dist.simulator.rules.lexical import LexicalAppraiser


def reply(grade, change, family="x"):
    return GradedReply(family=family, grade=grade, text="", change=change)


def test_pairs_compare_good_mediocre_and_the_rest_but_not_bad_with_hacking():
    pairs = list(ordered_pairs([reply(3, 5.0), reply(2, 1.0), reply(1, 0.0), reply(0, -9.0)]))
    assert [(high.grade, low.grade) for high, low in pairs] == [(3, 2), (3, 1), (3, 0), (2, 1), (2, 0)]


def test_report_by_hand():
    # pairs: good > mediocre wrong, good > hack right, mediocre > hack right
    found = report([[reply(3, 1.0, "good"), reply(2, 2.0, "mediocre"), reply(0, 0.5, "flattery")]])
    assert found.accuracy == 2 / 3
    assert found.by_family == {"flattery": 1.0, "good": 0.5, "mediocre": 0.5}
    assert [one.family for one in found.gaining_hacks] == ["flattery"]


@pytest.mark.parametrize("kind", [EmbeddedAppraiser, LexicalAppraiser])
def test_sanity_replies_have_their_order(kind):
    contexts = yaml.safe_load(SANITY_FILE.read_text(encoding="utf-8"))
    found = report(grade_contexts(kind(), contexts))
    assert found.accuracy >= 0.9
    assert found.gaining_hacks == []
