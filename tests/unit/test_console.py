"""What a run prints: on a terminal, in a file, in another encoding."""

import io
import math
import os
import pty
import re
import threading
import time
from functools import partial

import pytest

from rlver_dist.dialogue import Dialogue
from rlver_dist.tracking import console as console_module
from rlver_dist.tracking import progress
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.curve import draw_curve
from rlver_dist.tracking.progress import Stage, duration, reported
from tests.unit import builders


def make_dialogue(reply: str, thinking: str = "") -> Dialogue:
    turn = builders.turn(reply=reply, thinking=thinking, emotion_after=34.4, user_message="it was Monday")
    return builders.dialogue([turn], persona_id="p7", opening="I lost my job", final_emotion=34.4)


def plain(encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    return Console(25, file=io.TextIOWrapper(raw, encoding=encoding, write_through=True)), raw


def on_terminal(use) -> str:
    """What `use(console)` writes to a pseudo-terminal."""
    leader, follower = pty.openpty()
    written: list[bytes] = []

    def drain() -> None:
        try:
            while chunk := os.read(leader, 65536):
                written.append(chunk)
        except OSError:
            pass  # Linux ends a pseudo-terminal's output with EIO.

    reader = threading.Thread(target=drain)
    reader.start()
    with open(follower, "w", encoding="utf-8") as file:
        use(Console(25, file=file))
    reader.join()
    os.close(leader)
    return b"".join(written).decode()


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_plain_phase_is_two_lines_without_control_codes():
    console, raw = plain()
    with console.phase("rollout", 200) as advance:
        for turns in range(200):
            advance(1, turns=turns)
    assert re.fullmatch(r"rollout: 200 \.\.\.\nrollout: done in \d\.\d s\n", raw.getvalue().decode())


def test_plain_phase_tells_what_is_missing():
    console, raw = plain()
    with console.phase("rollout", 3) as advance:
        advance(2)
    assert "rollout: 2 of 3, done in" in raw.getvalue().decode()


def test_a_long_plain_stage_tells_done_of_all_rate_and_time_left(monkeypatch):
    # Otherwise it does so every 30 s, also while the block keeps its own thread busy.
    monkeypatch.setattr(console_module, "reported", partial(reported, every_s=0.05))
    console, raw = plain()
    with console.phase("controls", None, "tokens") as stage:
        time.sleep(0.2)
        stage.reach(1500, 6000)
        time.sleep(0.3)
    lines = raw.getvalue().decode().splitlines()
    assert lines[0] == "controls ..." and re.fullmatch(r"controls: 1500 of 6000, done in 0\.\d s", lines[-1])
    assert re.fullmatch(r"controls: 0\.\d s so far", lines[1])
    assert re.fullmatch(r"controls: 1500 of 6000 tokens, \d+ a second, about \d\.\d s left", lines[-2])


def test_rates_and_times_by_hand(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stage = Stage("evaluation before", 320, "turns")
    now = 160.0
    assert stage.line() == "evaluation before: 0 of 320 turns, 60 s so far" and stage.left_s is None
    stage(80)
    # 80 in 60 s, so 240 in 180.
    assert stage.left_s == pytest.approx(180)
    assert stage.line() == "evaluation before: 80 of 320 turns, 1.33 a second, about 180 s left"
    stage(240)
    assert stage.left_s == 0


def test_a_count_that_begins_anew_has_a_rate_of_its_own(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stage = Stage("update", None, "tokens")
    now = 60.0  # seconds in which another learner computed
    stage.reach(0, 20000)
    stage.reach(5000, 5000)
    stage.reach(512, 20000)
    now = 64.0
    stage.reach(1000, 20000)
    assert stage.line() == "update: 1000 of 20000 tokens, 250 a second, about 76 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (45, "45 s"), (599, "599 s"), (600, "10 min"), (7199, "2 h 0 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("error", "verb"), [(ValueError, "failed"), (KeyboardInterrupt, "stopped")])
def test_phase_names_itself_where_it_breaks(error, verb):
    console, raw = plain()
    with pytest.raises(error), console.phase("learner", None):
        raise error
    assert re.fullmatch(rf"learner \.\.\.\nlearner: {verb} after \d\.\d s\n", raw.getvalue().decode())


def test_terminal_bars_move_nest_and_vanish():
    def use(console: Console) -> None:
        with console.phase("rollout", 8) as advance:
            advance(3, turns=17)
            with console.phase("scoring", None, "tokens") as inner:
                inner.reach(5, 7)
                time.sleep(0.5)  # a terminal is drawn ten times a second
            console.note("still here")
        console.note("after")

    written = on_terminal(use)
    assert "3/8" in written
    assert "turns 17" in written
    assert "5/7" in written  # how much there is was not known at the start
    assert "rollout: " not in written and "scoring: " not in written
    assert written.rstrip().endswith("after")
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") > 0  # the cursor comes back


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")

    def use(console: Console) -> None:
        with console.phase("rollout", 8) as advance:
            advance(8)

    written = on_terminal(use)
    assert "\x1b" not in written
    assert written.startswith("rollout: 8 ...")


def test_iteration_line_and_its_change():
    console, raw = plain()
    summary = {
        "progress/iteration": 3.0,
        "reward/emotion_final": 41.24,
        "reward/mean": 0.4124,
        "reward/success_share": 0.04,
        "rollout/reply_tokens": 38.4,
        "rollout/well_formed_share": 0.975,
        "learner/kl_ref": 0.00123,
        "time/iteration_s": 42.3,
        "time/rollout_s": 9.1,
        "time/learner_s": 31.0,
        "time/sync_s": 1.2,
    }
    console.iteration(summary)
    console.iteration({"progress/iteration": 4.0, "reward/emotion_final": 40.44, "time/iteration_s": 7.25})
    assert raw.getvalue().decode().splitlines() == [
        (
            "iteration 3/25  emotion 41.2  reward 0.412  success 0.04  format 0.97  len 38  kl 0.0012  42 s "
            "(rollout 9, learner 31, sync 1)"
        ),
        "iteration 4/25  emotion 40.4 (-0.8)  7.2 s",
    ]


def test_end_of_a_run_as_plain_text(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    console, raw = plain()
    summary = {
        "before": 41.2,
        "after": 46.3,
        "difference": 5.1,
        "interval95": [2.1, 8.0],
        "num_eval_personas": 40,
        "wall_s": 1500.0,
        "second_appraiser": {"before": 41.0, "after": 40.0, "difference": -1.0, "interval95": [-2.0, 0.5]},
        "warm_up": {
            "before": 40.0,
            "after": 41.2,
            "difference": 1.2,
            "interval95": [-1.0, 3.5],
            "thinking_distinct2": {"before": 0.0, "after": 0.8},
            "perplexity": {"before": 6.0, "after": 12.0},
            "well_formed": {"before": 1.0, "after": 0.0},
            "second_appraiser": {
                "before": 43.0,
                "after": 41.0,
                "difference": -2.0,
                "interval95": [-3.0, -1.0],
            },
        },
        "well_formed": {"before": 0.0, "after": 0.0},
        "distinct2": {"before": 0.712, "after": 0.66},
        "thinking_distinct2": {"before": 0.8, "after": 0.25},
        "perplexity": {"before": 12.0, "after": 13.5},
    }
    console.finish(
        [40.0, 44.0, 48.0],
        tmp_path,
        summary,
        [(make_dialogue("Oh\n no.", "They\n grieve."), make_dialogue("A hard day."))],
    )
    lines = raw.getvalue().decode().splitlines()
    assert "  emotion                    41.2 -> 46.3 (+5.1, 95 % interval +2.1 to +8.0)" in lines
    assert "  emotion, second judge      41.0 -> 40.0 (-1.0, 95 % interval -2.0 to +0.5)" in lines
    assert "  emotion, warm-up alone     40.0 -> 41.2 (+1.2, 95 % interval -1.0 to +3.5)" in lines
    assert "    the same, second judge   43.0 -> 41.0 (-2.0, 95 % interval -3.0 to -1.0)" in lines
    assert "  well-formed replies        0 -> 0" in lines
    assert "  distinct2                  0.712 -> 0.66" in lines
    assert "  distinct2 of thoughts      0.8 -> 0.25" in lines
    assert "  perplexity                 12 -> 13.5 (base model: 6)" in lines
    first = lines.index("-- before")
    assert lines[first + 1 : first + 6] == [
        "user [30]: I lost my job",
        "  [thinks: They grieve.]",
        "policy [30 -> 34]: Oh no.",
        "user [34]: it was Monday",
        "end: max_turns, emotion 34",
    ]
    assert "policy [30 -> 34]: A hard day." in lines[lines.index("-- after") :]
    assert f"Results after 25 min in {tmp_path}" in lines
    assert [line for line in lines if line.startswith("  summary.json")]
    assert not [line for line in lines if line.startswith("  policy")]


def test_end_of_a_run_without_evaluation(tmp_path):
    console, raw = plain()
    console.finish([], tmp_path, {}, [])
    assert raw.getvalue().decode() == f"\nResults in {tmp_path}\n"


def test_wide_terminal_shows_dialogues_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    pair = (make_dialogue("Oh no."), make_dialogue("A hard day."))
    written = on_terminal(lambda console: console.finish([], tmp_path, {}, [pair]))
    assert re.search(r"Oh no\. +policy \[30 -> 34\]: A hard day\.", written)


def test_model_text_cannot_steer_the_terminal(tmp_path):
    hostile = make_dialogue("\x1b[2Jgone\x07 [red]not markup[/red] \u202e:smile:")
    written = on_terminal(lambda console: console.finish([], tmp_path, {}, [(hostile, hostile)]))
    assert "\x1b[2J" not in written
    assert "\x07" not in written
    assert "\u202e" not in written
    assert "[red]not markup[/red]" in written
    assert ":smile:" in written


def test_encoding_without_unicode_gets_ascii(tmp_path):
    console, raw = plain("ascii")
    console.finish([40.0, 41.0], tmp_path, {}, [(make_dialogue("caf\u00e9 \U0001f622"), make_dialogue("ok"))])
    assert "caf? ?" in raw.getvalue().decode("ascii")


def test_curve_by_hand():
    assert draw_curve([10.0, 12.0, math.nan, 11.0], width=4, height=3, ascii_only=True) == [
        "   12.0 +  *",
        "   11.0 +    *",
        "   10.0 + *",
        "        +-----",
        "          1  4  iteration",
    ]


def test_curve_of_one_value_many_values_and_none():
    assert draw_curve([50.0], height=3, ascii_only=True)[-1].split() == ["1", "iteration"]
    assert draw_curve([50.0, 50.0], height=3, ascii_only=True)[2].startswith("   50.0 + *")
    assert draw_curve([], ascii_only=True) == draw_curve([math.nan], ascii_only=True) == []
    long = draw_curve([float(value) for value in range(1000)], width=60, ascii_only=True)
    assert sum(line.count("*") for line in long) == 60
    assert max(map(len, long)) <= 10 + 60 + len("  iteration")
    assert long[-1].split() == ["1", "1000", "iteration"]
