"""Held-out dialogues of a finished run, appraised again by the rules of now.

    python -m scripts.reappraise runs/mine --personas 16

Prints the mean final emotion before and after training, as recorded and as the embedded appraiser of this
checkout has it; what was said stays as it was.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from pathlib import Path

from rlver_dist.config.enums import Preset
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.data.personas import load_split
from rlver_dist.evaluation.held_out import reappraise
from rlver_dist.ledger.parquet import read_dialogues
from rlver_dist.simulator.llm.judges import RuleJudge
from rlver_dist.simulator.presets import resolve_rules
from rlver_dist.simulator.rules.appraisal import EmbeddedAppraiser


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Appraise a run's held-out dialogues again.")
    parser.add_argument("run", type=Path, help="a run's output_dir")
    parser.add_argument("--personas", type=int, default=16, help="how many dialogues of each evaluation")
    arguments = parser.parse_args()
    rules = resolve_rules(SimulatorConfig(preset=Preset.sage))
    personas = {persona.id: persona for persona in load_split("bank", "evaluation")}
    judge = RuleJudge(appraiser=EmbeddedAppraiser(), rules=rules)
    for phase in ("before", "after"):
        dialogues = read_dialogues(next((arguments.run / "dialogues").glob(f"{phase}_*.parquet")))[
            : arguments.personas
        ]
        recorded = statistics.fmean(dialogue.final_emotion for dialogue in dialogues)
        again = statistics.fmean(
            asyncio.run(reappraise(one, personas[one.persona_id], judge, rules.emotion)) for one in dialogues
        )
        print(
            f"{phase}: recorded {recorded:.1f}, by the rules of now {again:.1f} ({len(dialogues)} dialogues)"
        )


if __name__ == "__main__":
    main()
