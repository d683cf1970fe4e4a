"""Whether a change of the code left a run's behaviour as it was: two checkouts, one configuration.

    python -m benchmarks.equivalence OLD_CHECKOUT NEW_CHECKOUT [--python PATH] [--out FOLDER] [overrides ...]

Measures what the two checkouts' ledgers and exported weights have in common after two iterations of
`+exp=grpo_no_think +on=tiny` in float32 (or what the overrides make of it), one after the other on this
machine. The reference is a second run of OLD_CHECKOUT: sampled ids and rewards have to be the same in all
three runs, and the weights have to differ from one of the two old runs by no more than these differ from each
other. Exit code 1 where they do not, 2 where a run does not end.

PATH is the Python of an environment that has the package's dependencies; an editable install in it does not
matter, since each checkout stands first on the path of its run. Nothing of the package is imported here, so
that one script reads the files of both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

DEFAULTS = (
    "+exp=grpo_no_think",
    "+on=tiny",
    "model.dtype=float32",
    "seed=7",
    "num_iterations=2",
    "tracking.wandb=disabled",
)
EXIT_DIFFERENT = 1
EXIT_FAILED = 2
TAIL_LINES = 20

DialogueKey = tuple[str, str]
"""File of the ledger, and id of the dialogue in it."""


class RunFailed(Exception):
    """A checkout's run did not end, or was of another checkout's package."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Ledger:
    """What a run sampled and paid.

    Attributes:
        ids: token ids of each turn's reply, by dialogue.
        rewards: by dialogue, None where it was never scored.
    """

    ids: dict[DialogueKey, list[list[int]]]
    rewards: dict[DialogueKey, float | None]


@dataclass(kw_only=True, slots=True, frozen=True)
class Difference:
    """How two runs differ.

    Attributes:
        dialogues: numbers of dialogues of the two.
        other_ids: dialogues with other sampled ids, or that only one run has.
        other_rewards: dialogues with another reward, or that only one run has.
        weights: largest absolute difference of an exported weight, infinite where names or shapes differ.
    """

    dialogues: tuple[int, int]
    other_ids: int
    other_rewards: int
    weights: float

    @property
    def same_dialogues(self) -> bool:
        """Whether sampled ids and rewards are identical."""
        return not self.other_ids and not self.other_rewards


def read_ledger(run: Path) -> Ledger:
    """Sampled ids and rewards of all phases of a run."""
    ids: dict[DialogueKey, list[list[int]]] = {}
    rewards: dict[DialogueKey, float | None] = {}
    for path in sorted((run / "dialogues").glob("*.parquet")):
        for row in pq.read_table(path, columns=["id", "reward", "turns"]).to_pylist():
            key = (path.name, row["id"])
            ids[key] = [turn["reply_ids"] for turn in row["turns"]]
            rewards[key] = row["reward"]
    return Ledger(ids=ids, rewards=rewards)


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    """The exported policy by name, whatever files it lies in."""
    return {
        name: tensor.float()
        for path in sorted((run / "policy").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two models' weights, infinite where names or shapes differ."""
    shapes = [{name: weight.shape for name, weight in model.items()} for model in (first, second)]
    if shapes[0] != shapes[1] or not first:
        return float("inf")
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def compare(first: Path, second: Path) -> Difference:
    """Compare two runs by their folders."""
    ledgers = read_ledger(first), read_ledger(second)
    ids = ledgers[0].ids, ledgers[1].ids
    rewards = ledgers[0].rewards, ledgers[1].rewards
    keys = ids[0].keys() | ids[1].keys()
    shared = ids[0].keys() & ids[1].keys()
    lonely = len(keys) - len(shared)
    return Difference(
        dialogues=(len(ids[0]), len(ids[1])),
        other_ids=lonely + sum(ids[0][key] != ids[1][key] for key in shared),
        other_rewards=lonely + sum(rewards[0][key] != rewards[1][key] for key in shared),
        weights=largest_difference(read_weights(first), read_weights(second)),
    )


def with_defaults(overrides: list[str]) -> list[str]:
    """The overrides behind those of `DEFAULTS` whose key they do not name."""
    named = {_key(override) for override in overrides}
    return [*(default for default in DEFAULTS if _key(default) not in named), *overrides]


def _key(override: str) -> str:
    return override.lstrip("+").split("=")[0]


def run_checkout(checkout: Path, python: Path, out: Path, overrides: list[str]) -> None:
    """Run `checkout` into the folder `out`, its log beside it.

    Raises:
        RunFailed: see the class; or `out` holds a run already, which this one would go on from.
    """
    if out.exists():
        raise RunFailed(f"{out}: is there already; name another folder or remove it")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        # ninja, which compiles DeepSpeed's extension, lies beside the environment's Python.
        "PATH": f"{python.parent}{os.pathsep}{environment.get('PATH', '')}",
        "DS_ACCELERATOR": "cpu",
        # Ray's workers inherit it, and it stands before what an editable install adds.
        "PYTHONPATH": str(checkout),
        "PYTHONUNBUFFERED": "1",
    }
    where = "import rlver_dist.launch as launch; print(launch.__file__)"
    found = subprocess.run(
        [python, "-c", where], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if not found.stdout.startswith(f"{checkout}{os.sep}"):
        raise RunFailed(f"{checkout}: not its own package, {found.stdout.strip() or found.stderr.strip()}")
    log = out.with_suffix(".log")
    command = [python, "-m", "rlver_dist.launch", *with_defaults(overrides), f"output_dir={out}"]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, cwd=checkout, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8").splitlines()[-TAIL_LINES:]
        raise RunFailed("\n".join([f"{checkout}: exit code {done.returncode}, {log} ends with", *tail]))


def report(spread: Difference, changes: list[Difference]) -> tuple[list[str], bool]:
    """Lines of the result, and whether the new run is equivalent.

    Args:
        spread: the second old run against the first.
        changes: the new run against each of the two old ones.
    """
    lines = []
    named = zip(("old, again", "new", "new"), (spread, *changes), ("old", "old", "old, again"), strict=True)
    for name, difference, reference in named:
        lines.append(
            f"{name} against {reference}: {difference.dialogues[1]} and {difference.dialogues[0]} dialogues, "
            f"sampled ids {_same(difference.other_ids)}, rewards {_same(difference.other_rewards)}, weights "
            f"differ by {difference.weights:.3g} at most"
        )
    nearest = min(difference.weights for difference in changes)
    within = nearest <= spread.weights and nearest != float("inf")
    equivalent = within and all(difference.same_dialogues for difference in changes)
    ratio = "" if not spread.weights else f" ({nearest / spread.weights:.3g} times it)"
    lines.append(f"weights are {'within' if within else 'beyond'} the spread of two old runs{ratio}")
    return [*lines, "equivalent" if equivalent else "different"], equivalent


def _same(number: int) -> str:
    return f"differ in {number} dialogues" if number else "identical"


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compare the runs of two checkouts.")
    parser.add_argument("old", type=Path, help="checkout before the change")
    parser.add_argument("new", type=Path, help="checkout after it")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python of the runs")
    parser.add_argument("--out", type=Path, help="folder of the three runs; a temporary one without it")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for all runs")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="equivalence_") as temporary:
        out = (arguments.out or Path(temporary)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        runs = {"old": arguments.old, "old_again": arguments.old, "new": arguments.new}
        try:
            for name, checkout in runs.items():
                # A virtual environment's Python is a link, and only under its own name it finds its packages.
                run_checkout(checkout.resolve(), arguments.python.absolute(), out / name, arguments.overrides)
                print(f"{name}: run", flush=True)
        except RunFailed as error:
            print(error, file=sys.stderr)
            return EXIT_FAILED
        old, again, new = (out / name for name in runs)
        lines, equivalent = report(compare(old, again), [compare(old, new), compare(again, new)])
    print("\n".join(lines))
    return 0 if equivalent else EXIT_DIFFERENT


if __name__ == "__main__":
    raise SystemExit(main())
