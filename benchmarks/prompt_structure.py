"""How a chat template writes a prompt, in token ids: what of it a reply may change, and what not. A part of
`benchmarks/red_team.py`, which measures.

`tests/data/chat_templates.yaml` holds the templates; all are rendered with SmolLM2's vocabulary and the
family's special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.dialogue import Message


@dataclass(kw_only=True, slots=True, frozen=True)
class Template:
    """One family's way to write a prompt.

    Attributes:
        name: of the family.
        tokenizer: with the family's special tokens and its chat template.
        special: ids that are special to it.
        headers: role marks that are ordinary text.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    special: frozenset[int]
    headers: tuple[str, ...]


@cache
def load_templates(path: Path) -> list[Template]:
    """SmolLM2's own template, and each of the file on SmolLM2's vocabulary with the family's special tokens
    added."""
    folder = resolve(SMOLLM2)
    own = {SMOLLM2: {"special": [], "headers": [], "template": None}}
    templates = []
    for name, row in (own | yaml.safe_load(path.read_text(encoding="utf-8"))).items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(
            [AddedToken(token, special=True, normalized=False) for token in row["special"]],
            special_tokens=True,
        )
        tokenizer.chat_template = row["template"] or tokenizer.chat_template
        special = frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
        templates.append(
            Template(name=name, tokenizer=tokenizer, special=special, headers=tuple(row["headers"]))
        )
    return templates


def skeleton(template: Template, messages: Sequence[Message]) -> list[Any]:
    """The rendered prompt as special ids and the stretches of ordinary ids between them, then numbers of
    textual headers, whether the messages stand in it as they are, and how it begins the answer."""
    conversation = [{"role": message.role.value, "content": message.text} for message in messages]
    asked, text = (
        template.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=begun)
        for begun in (False, True)
    )
    parts: list[Any] = []
    run: list[int] = []
    for index in template.tokenizer(text, add_special_tokens=False).input_ids:
        if index in template.special:
            parts += [tuple(run), index]
            run = []
        else:
            run.append(index)
    whole = all(message.text.strip() in text for message in messages)
    return [
        *parts,
        tuple(run),
        *(text.count(header) for header in template.headers),
        whole,
        text.removeprefix(asked),
    ]


def keeps_structure(parts: list[Any], harmless: tuple[list[Any], list[Any]]) -> bool:
    """Whether `parts` differ from the first of two harmless skeletons only in the one place where these two
    differ from each other."""
    first, second = harmless
    free = [place for place, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
    same = len(parts) == len(first) and all(
        one == other for place, (one, other) in enumerate(zip(parts, first, strict=True)) if place not in free
    )
    return same and len(free) == 1


def num_tokens(parts: Sequence[int | tuple[int, ...]]) -> int:
    """Tokens of a skeleton of a template without textual headers."""
    *tokens, _, _ = parts
    return sum(len(part) if isinstance(part, tuple) else 1 for part in tokens)
