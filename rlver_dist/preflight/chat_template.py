"""A model folder's chat template, rendered before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlver_dist.errors import ConfigError

OPENING, REPLY, ANSWER, SYSTEM = "an opening", "a reply", "an answer", "a system message"
CLOCK = "strftime_now"
"""The function by which a template asks for the date."""
OPEN_TAG = "<think>"


@dataclass(kw_only=True, slots=True, frozen=True)
class TemplateUse:
    """How a template is going to be used.

    Attributes:
        system: a system message is sent.
        think: the policy thinks first.
        kwargs: further variables of the template (`model.chat_template_kwargs`).
        without_system: the option that switches the system message off; empty where there is none.
    """

    system: bool
    think: bool
    kwargs: Mapping[str, object]
    without_system: str


def read_template(folder: Path) -> str | None:
    """The chat template of a model folder, as transformers chooses it; None where there is none."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    try:
        held = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(held, list):  # several by name
        held = {entry.get("name"): entry.get("template") for entry in held}.get("default")
    return held if isinstance(held, str) else None


def check_template(template: str | None, where: str, use: TemplateUse) -> list[str]:
    """Refuse a template that cannot say what a dialogue consists of; `where` names the option.

    Returns:
        Warnings, such as of a template that tells the date.

    Raises:
        ConfigError: there is none, it fails, it drops a message, or it opens the thinking itself where the
            policy replies without.
    """
    if template is None:
        raise ConfigError(
            f"{where}: its tokenizer has no chat template; use a chat model, or add chat_template.jinja to "
            f"its folder"
        )
    spoken = [("user", OPENING), ("assistant", REPLY), ("user", ANSWER)]
    text = _render(template, spoken, where, use)
    if use.system:
        try:
            text = _render(template, [("system", SYSTEM), *spoken], where, use)
        except ConfigError as error:
            if not use.without_system:
                raise
            raise ConfigError(f"{error}, or send no system message: {use.without_system}") from error
    for content in (SYSTEM, OPENING, REPLY, ANSWER) if use.system else (OPENING, REPLY, ANSWER):
        if content not in text:
            raise ConfigError(
                f"{where}: its chat template leaves out {content}; use a model whose template has it"
                + (f", or {use.without_system}" if content == SYSTEM and use.without_system else "")
            )
    if OPEN_TAG in text.rpartition(ANSWER)[2] and not use.think:
        raise ConfigError(
            f"{where}: its chat template begins each reply with {OPEN_TAG} and rollout.think is off; use "
            f"rollout.think=true, or where the template knows it "
            f"+model.chat_template_kwargs.enable_thinking=false"
        )
    if CLOCK in template:
        return [
            f"warning: {where}: its chat template tells the date, so prompts differ from day to day; fix it "
            f"with +model.chat_template_kwargs.date_string='...' where the template knows that"
        ]
    return []


def _render(template: str, spoken: Sequence[tuple[str, str]], where: str, use: TemplateUse) -> str:
    # transformers' own, which knows its extensions to Jinja; this module of it does not import torch.
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{"role": role, "content": content} for role, content in spoken]
    try:
        rendered, _ = render_jinja_template(
            conversations=[conversation],
            chat_template=template,
            add_generation_prompt=True,
            **use.kwargs,
        )
    except Exception as error:
        what = "a system message" if spoken[0][0] == "system" else "a dialogue"
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{where}: its chat template refuses {what} ({said}); use a model whose template takes it"
        ) from error
    return str(rendered[0])
