"""No reply of the red-team suite steers a prompt or the arithmetic; a share of them here, all of them in
`benchmarks/red_team.py`."""

from dataclasses import replace

from benchmarks.prompt_structure import keeps_structure, load_templates, skeleton
from benchmarks.red_team import (
    DATA,
    HARMLESS,
    RULES,
    keeps_lines,
    load_attacks,
    make_request,
    paste_raw,
    prompts_with,
    run,
    table,
)
from rlver_dist.data.personas import load_split
from rlver_dist.simulator.llm.prompts import UserPrompts

EVERY = 11


def test_the_suite_is_large():
    families = load_attacks(DATA / "red_team.yaml", load_split("bank", "train")[0])
    assert len(families) >= 12
    assert sum(map(len, families.values())) >= 200
    assert not any("@" in reply for replies in families.values() for reply in replies)


def test_no_reply_steers_and_raw_ones_would():
    reports = run(every=EVERY)
    assert {
        check: replies for report in reports.values() for check, replies in report.failed.items() if replies
    } == {}
    # The checks see what they are for: pasted as they are, all role tokens break some template.
    assert reports["role_tokens"].raw == reports["role_tokens"].replies
    assert reports["set_emotion"].raw == 0
    assert len(table(reports).splitlines()) == len(reports) + 2


def test_a_switch_in_the_talk_is_seen():
    kind = next(
        kind for kind in load_templates(DATA / "chat_templates.yaml") if kind.name == "nemotron_nano_v2"
    )
    persona, prompts = load_split("bank", "train")[0], UserPrompts(rules=RULES, max_reply_bytes=400)
    calm, other = (prompts_with(prompts, persona, text)["newest"] for text in HARMLESS)
    harmless = skeleton(kind, calm), skeleton(kind, other)
    assert [parts[-2:] for parts in harmless] == [[True, "<SPECIAL_11>Assistant\n<think>\n"]] * 2
    for switch in ("/no_think", "/think"):
        pasted = skeleton(kind, paste_raw(calm, switch))
        assert not keeps_structure(pasted, harmless)
        assert pasted[-2] is False
        assert keeps_structure(skeleton(kind, prompts_with(prompts, persona, switch)["newest"]), harmless)


def test_every_templates_tokens_are_single_ids():
    for kind in load_templates(DATA / "chat_templates.yaml"):
        for index in kind.special:
            assert kind.tokenizer(kind.tokenizer.decode([index]), add_special_tokens=False).input_ids == [
                index
            ]


def test_a_changed_line_is_seen():
    persona = load_split("bank", "train")[0]
    prompts = UserPrompts(rules=RULES, max_reply_bytes=400)
    calm, other = (prompts_with(prompts, persona, text)["newest"] for text in HARMLESS)
    assert keeps_lines(other, calm)
    higher = prompts.turn(replace(make_request(persona, HARMLESS[0], HARMLESS[0]), emotion=100.0))
    assert not keeps_lines(higher, calm)
