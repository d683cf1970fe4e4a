"""The ledger on disk: one Parquet file an iteration and phase, one row a dialogue, the turns nested in it.

A file under `dialogues/` is complete. Its metadata carries the schema's version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rlver_dist.dialogue import Dialogue
from rlver_dist.errors import DataError
from rlver_dist.files import whole_file
from rlver_dist.ledger.records import DialogueRecord, Phase, appraisal_hashes, from_row, to_row

SCHEMA_VERSION = 3
PhaseName = Literal["train", "before", "after", "control", "warm_up"]
VERSION_KEY = b"rlver_dist.ledger_schema"


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _list_of(kind: pa.DataType) -> pa.ListType:
    return pa.list_(_required("element", kind))


# One entry a feature: each appraiser names its own, so that they cannot be fields of a struct.
_FEATURE = pa.struct([_required("name", pa.string()), _required("value", pa.float64())])
_APPRAISAL = pa.struct(
    [
        _required("content", pa.string()),
        _required("fit", pa.string()),
        _required("activity", pa.string()),
        _required("feeling", pa.string()),
        _required("change", pa.float64()),
        _required("features", _list_of(_FEATURE)),
        _required("source", pa.string()),
    ]
)
_TURN = pa.struct(
    [
        _required("index", pa.int32()),
        _required("prompt_ids", _list_of(pa.int32())),
        _required("reply_ids", _list_of(pa.int32())),
        # float64, although engines compute float32: a Python float comes back as the same number.
        _required("logprobs", _list_of(pa.float64())),
        _required("reply", pa.string()),
        _required("thinking", pa.string()),
        _required("thinking_tokens", pa.int32()),
        _required("well_formed", pa.bool_()),
        _required("truncated", pa.bool_()),
        _required("emotion_before", pa.float64()),
        _required("emotion_after", pa.float64()),
        pa.field("appraisal", _APPRAISAL),
        pa.field("appraisal_inputs", pa.string()),
        pa.field("user_message", pa.string()),
        _required("policy_version_first", pa.int64()),
        _required("policy_version_last", pa.int64()),
    ]
)
SCHEMA = pa.schema(
    [
        _required("iteration", pa.int64()),
        _required("phase", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("advantage", pa.float64()),
        _required("id", pa.string()),
        _required("persona_id", pa.string()),
        _required("group_id", pa.string()),
        _required("seed", pa.int64()),
        _required("opening", pa.string()),
        _required("start_emotion", pa.float64()),
        _required("turns", _list_of(_TURN)),
        _required("end_reason", pa.string()),
        _required("final_emotion", pa.float64()),
        pa.field("error", pa.string()),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
"""Emotions in points (0 to 100), log-probs in nats, rewards 0 to 1; the columns are the fields of
`DialogueRecord`."""


def dialogues_path(output_dir: str | Path, *, phase: Phase | PhaseName, iteration: int) -> Path:
    """Where a run keeps one phase's dialogues, for example `dialogues/train_000003.parquet`."""
    return Path(output_dir) / "dialogues" / f"{Phase(phase).value}_{iteration:06d}.parquet"


def drop_later(output_dir: str | Path, iteration: int) -> None:
    """Delete the dialogues of every iteration after `iteration`, the one that a run goes on from.

    They were sampled by a policy that resuming an older checkpoint has given up. If they stayed, they would
    count as this run's until it reaches those iterations and writes its own, or forever if it never does.
    """
    for phase in Phase:
        folder = dialogues_path(output_dir, phase=phase, iteration=iteration).parent
        for path in folder.glob(f"{phase.value}_*.parquet"):
            number = path.stem.removeprefix(f"{phase.value}_")
            # Files with another name are the user's, such as a copy.
            if number.isdecimal() and int(number) > iteration:
                path.unlink()


def write_dialogues(
    path: str | Path,
    dialogues: Sequence[Dialogue],
    *,
    iteration: int,
    phase: Phase | PhaseName,
    rewards: Mapping[str, float],
    advantages: Mapping[str, float] | None = None,
) -> None:
    """Write one phase's dialogues with their rewards and advantages, in the given order.

    An older file is replaced; if writing fails, it stays.

    Args:
        path: the file; see `dialogues_path`. Its folder is made where missing.
        dialogues: failed ones too; ids differ, seeds fit into 64 signed bits.
        iteration: the training iteration that they belong to.
        phase: see `Phase`.
        rewards: reward by dialogue id; absent where a dialogue was never scored.
        advantages: advantage by dialogue id; absent where a dialogue did not enter the loss.

    Raises:
        ValueError: two dialogues share an id, or a reward or advantage belongs to none of them.
    """
    advantages = advantages or {}
    # A reward finds its row by id alone: a duplicate or unknown id would put it on the wrong row, or nowhere.
    ids = {dialogue.id for dialogue in dialogues}
    if len(ids) != len(dialogues):
        raise ValueError(
            f"{path}: {len(dialogues)} dialogues with {len(ids)} ids; every dialogue needs its own"
        )
    if strangers := sorted((rewards.keys() | advantages.keys()) - ids):
        raise ValueError(
            f"{path}: rewards or advantages for dialogues that are not written: {', '.join(strangers[:3])}"
        )
    rows = [
        to_row(
            DialogueRecord(
                dialogue=dialogue,
                iteration=iteration,
                phase=Phase(phase),
                reward=rewards.get(dialogue.id),
                advantage=advantages.get(dialogue.id),
                appraisal_inputs=appraisal_hashes(dialogue),
            )
        )
        for dialogue in dialogues
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(Path(path)) as aside:
        pq.write_table(table, aside, compression="zstd")


def read_records(path: str | Path) -> list[DialogueRecord]:
    """Read one file of the ledger, in the order of writing.

    Raises:
        DataError: the file is missing, is no Parquet, or has another schema version.
    """
    try:
        with pq.ParquetFile(path) as file:
            version = (file.schema_arrow.metadata or {}).get(VERSION_KEY, b"none").decode()
            # Compared before a row is read: a row of another version lacks fields or has strange ones.
            if version != str(SCHEMA_VERSION):
                raise DataError(
                    f"{path}: ledger schema version {version}, this package reads {SCHEMA_VERSION}; read it "
                    f"with the package that wrote it"
                )
            rows = file.read().to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: not a readable dialogue file ({reason}); name a file under a run's dialogues/"
        ) from error
    return [from_row(row) for row in rows]


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """The dialogues of one file, equal to those that were written.

    Raises:
        DataError: as `read_records`.
    """
    return [record.dialogue for record in read_records(path)]
