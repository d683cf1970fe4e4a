"""A page of results shows the run that its figures are of."""

import json

from rlver_dist.ledger.parquet import dialogues_path, write_dialogues
from rlver_dist.ledger.records import Phase
from scripts.report_run import write_page
from tests.unit import builders

SUMMARY = {
    "iterations": 4,
    "num_eval_personas": 1,
    "wall_s": 60.0,
    "curve": [30.0, 31.0],
    "before": 30.0,
    "after": 38.0,
    "difference": 8.0,
    "interval95": [7.0, 9.0],
    "distinct2": {"before": 0.5, "after": 0.4},
    "perplexity": {"before": 20.0, "after": 10.0},
    "well_formed": {"before": 0, "after": 0.9},
    "warm_up": {
        "second_appraiser": {"before": 5.0, "after": 4.0, "difference": -1.0, "interval95": [-3.0, 1.0]},
        "before": 31.0,
        "after": 30.0,
        "difference": -1.0,
        "interval95": [-2.0, 0.5],
        "distinct2": {"before": 0.5, "after": 0.5},
        "thinking_distinct2": {"before": 0.0, "after": 0.7},
        "perplexity": {"before": 10.0, "after": 20.0},
        "well_formed": {"before": 1, "after": 0},
    },
}


def test_a_run_that_went_on_shows_its_last_replies_and_what_the_warm_up_changed(tmp_path):
    run = tmp_path / "run"
    for phase, iteration, reply in (
        (Phase.before, 0, "at first"),
        (Phase.after, 2, "half way"),
        (Phase.after, 4, "at last"),
    ):
        turn = builders.turn(reply=reply, emotion_after=38.0, appraisal=builders.appraisal(8.0))
        dialogue = builders.dialogue([turn], final_emotion=38.0)
        path = dialogues_path(run, phase=phase, iteration=iteration)
        write_dialogues(path, [dialogue], iteration=iteration, phase=phase, rewards={})
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "held_out.json").write_text("{}")
    (run / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "reward/mean": 0.3}) + "\n")
    (run / "config.yaml").write_text("output_dir: /home/somebody/run\nseed: 3\n")
    page = write_page(run, tmp_path / "page").read_text()
    assert "before (+8.0): at first" in page and "after (+8.0): at last" in page and "half way" not in page
    assert (
        "| perplexity | 20 | 10 | x 0.50 | |" in page
        and "| perplexity, warm-up alone | 10 | 20 | x 2.00 | |" in page
    )
    assert "| emotion, second judge, warm-up alone | 5.00 | 4.00 | -1.00 | -3.00 to +1.00 |" in page
    assert "| well_formed | 0 | 0.9 |  | |" in page and "well_formed, warm-up alone" not in page
    assert (
        "thinking_distinct2" not in page and "somebody" not in (tmp_path / "page" / "config.yaml").read_text()
    )
    assert json.loads((tmp_path / "page" / "summary.json").read_text()) == SUMMARY
