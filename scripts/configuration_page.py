"""Writes docs/configuration.md: every option with its type, default and meaning, from `rlver_dist/config/`.

python -m scripts.configuration_page            # writes the page
python -m scripts.configuration_page --check    # exit code 1 where the committed page is another one
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, get_args, get_type_hints

from rlver_dist.config.run import RunConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
WIDTH = 110
HEAD = """\
# Configuration

Every option of a run. `python -m scripts.configuration_page` makes this page from the dataclasses in
`rlver_dist/config/`, and a test compares the two: change an option's docstring there, not this page.

An option is set on the command line as `group.key=value`, for example `learner.lr=1e-5`. The defaults below
are those of the dataclasses. The files in `conf/` hold what a recipe (`+exp=...`), a placement (`+on=...`) or
a group (`model=...`, `algorithm=...`, `simulator=...`, `cluster=...`) changes: see
[recipes and placements](recipes.md). Without a placement `conf/cluster/auto.yaml` applies. What a run really
used stands in the `config.yaml` of its output folder; `check=true` prints the run's arithmetic without a run.

A key or a value that is refused gives one line that names it and the way out, and exit code 2.
"""
GROUPS = {
    "top-level": "iterations, checkpoints, resume, seed, output folder, `check`",
    "model": "path, number format, context, system prompt, think instruction, LoRA",
    "algorithm": "PPO or GRPO, group size, gamma and lambda, whitening, clipping, importance-weight cap, KL "
    "(estimator, place, fixed or adaptive weight), entropy, updates per iteration, rewards by end, paid at "
    "the end or turn by turn, guards against reward hacking",
    "data": "personas: `bank` or a JSONL file, this project's or RLVER's",
    "simulator": "backend (`embedded`, `vllm`, `openai`), preset (`rlver_vanilla`, `rlver_challenging`, "
    "`sage`), difficulty knobs, replicas, calls a turn, number of judges, the users' engines, endpoints with "
    "limits and prices",
    "rollout": "dialogues, thinking, turns, tokens a reply, temperature, concurrency, time-out",
    "learner": "lr, warm-up, AdamW, clipping, packed row length, shared prefixes, ZeRO stage, optimizer "
    "offload, gradient checkpointing",
    "critic": "the same for PPO's critic; its trunk, head, value clip, passes, and iterations it learns "
    "alone first",
    "warm_up": "supervised stage that teaches the think format: dialogues, passes, lr",
    "cluster": "device, engines, ranks, shares of GPUs, threads, Ray address, dashboard",
    "evaluation": "held-out personas, turns, temperature, bootstrap, the second judge",
    "tracking": "W&B mode, project, name",
}
"""What each group holds, by the anchor of its heading."""


def field_docstrings(group: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, the fields of its bases included; a subclass wins."""
    found: dict[str, str] = {}
    for cls in reversed(group.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, after in zip(definition.body, definition.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[statement.target.id] = inspect.cleandoc(str(after.value.value))
    return found


def type_text(annotation: object) -> str:
    """A field's type in words; an enumeration as the names that it takes."""
    if isinstance(annotation, UnionType):
        return " or ".join(type_text(part) for part in get_args(annotation))
    if annotation is NoneType:
        return "null"
    assert isinstance(annotation, type)
    if issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    return {bool: "true, false", int: "integer", float: "number", str: "text"}[annotation]


def value_text(value: object) -> str:
    """A default as it is written on the command line."""
    if value is None:
        return "`null`"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else "empty"


def cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|")


def prose(*texts: str) -> list[str]:
    """Sentences as one wrapped paragraph, with an empty line after it."""
    sentences = " ".join(" ".join(text.split()) for text in texts if text)
    return [textwrap.fill(sentences, WIDTH, break_long_words=False, break_on_hyphens=False), ""]


def sections(options: DataclassInstance, prefix: str, introduction: str) -> list[str]:
    """The lines of a group and, after it, of the groups within it.

    Args:
        options: the group's dataclass, holding the defaults.
        prefix: dotted name of the group with a full stop at its end; empty for the whole run.
        introduction: what the field that holds the group says of it.
    """
    kind = type(options)
    documented = field_docstrings(kind)
    types = get_type_hints(kind)
    rows: list[str] = []
    inner: list[str] = []
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        meaning = documented.get(option.name, "")
        if isinstance(value, Enum) and not any(f"`{member.value}`" in meaning for member in type(value)):
            meaning += f" {inspect.getdoc(type(value))}"
        if dataclasses.is_dataclass(value):
            inner += sections(value, f"{prefix}{option.name}.", meaning)
        else:
            key = f"`{prefix}{option.name}`"
            rows.append(
                f"| {key} | {type_text(types[option.name])} | {value_text(value)} | {cell(meaning)} |"
            )
    name = prefix.rstrip(".") or "Top level"
    text = [f"{'###' if '.' in name else '##'} {name}", *prose(introduction, inspect.getdoc(kind) or "")]
    if rows:
        text += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return text + inner


def render() -> str:
    """The whole page."""
    index = [f"| [{anchor.replace('-', ' ')}](#{anchor}) | {holds} |" for anchor, holds in GROUPS.items()]
    table = ["| group | what it holds |", "|---|---|", *index, ""]
    return "\n".join([HEAD, *table, *sections(RunConfig(), "", "")]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
