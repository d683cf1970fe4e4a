"""A model folder's chat template, rendered before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlver_dist.errors import ConfigError
from rlver_dist.rollout.think_format import OPEN_TAG

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.nodes import Node
    from jinja2.parser import Parser

SYSTEM, OPENING, REPLY, ANSWER = "a system message", "an opening", "a reply", "an answer"
CLOCK = "strftime_now"
"""The function by which a template asks for the date."""


def check_template(
    folder: Path, where: str, *, system: bool, policy: bool, without_system: str = ""
) -> list[str]:
    """Refuse a template that cannot say what a dialogue consists of.

    Args:
        folder: of the model.
        where: the option and its value, for errors.
        system: a system message is sent.
        policy: the policy speaks by it, which has to open its thinking itself.
        without_system: what switches the system message off; empty where nothing does.

    Returns:
        Warnings, such as of a template that tells the date.

    Raises:
        ConfigError: there is none, it fails, it drops a message, or it opens the thinking itself.
    """
    template = read_template(folder)
    if template is None:
        raise ConfigError(
            f"{where}: its tokenizer has no chat template; use a chat model, or add chat_template.jinja to "
            f"{folder}"
        )
    tokens = _special_tokens(folder)
    talk = [("user", OPENING), ("assistant", REPLY), ("user", ANSWER)]
    text = _render(template, tokens, talk, f"{where}: its chat template refuses a dialogue", "")
    if system:
        refused = f"{where}: its chat template refuses a system message"
        text = _render(template, tokens, [("system", SYSTEM), *talk], refused, without_system)
    rest = text
    for content in (SYSTEM, OPENING, REPLY, ANSWER) if system else (OPENING, REPLY, ANSWER):
        _, found, rest = rest.partition(content)
        if not found:
            way_out = f", or {without_system}" if system and without_system else ""
            raise ConfigError(
                f"{where}: its chat template leaves out {content}, or puts it elsewhere; use a model whose "
                f"template has every message in its place{way_out}"
            )
    if policy and OPEN_TAG in rest:
        raise ConfigError(
            f"{where}: its chat template begins each reply with {OPEN_TAG}, which the policy has to write "
            f"itself; use a model whose template does not"
        )
    if CLOCK in template:
        return [f"warning: {where}: its chat template tells the date, so prompts differ from day to day"]
    return []


def prompt_tokens(folder: Path, system: str, openings: Sequence[str]) -> int | None:
    """Fewest tokens of a dialogue's first prompt; None where the folder has no `tokenizer.json` to count
    by."""
    template = read_template(folder)
    if template is None or not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    user = [("user", min(openings, key=count))]
    refused = f"{folder}: its chat template refuses a prompt"
    talk = [("system", system), *user] if system else user
    return count(_render(template, _special_tokens(folder), talk, refused, ""))


def read_template(folder: Path) -> str | None:
    """The chat template of a model folder, as transformers chooses it; None where there is none."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8", errors="replace")
    held = _tokenizer_config(folder).get("chat_template")
    if isinstance(held, list):  # several by name
        named = [entry for entry in held if isinstance(entry, dict)]
        held = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    return held if isinstance(held, str) else None


def _tokenizer_config(folder: Path) -> dict[str, object]:
    try:
        value = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _special_tokens(folder: Path) -> dict[str, str]:
    """Texts of special tokens by name, which templates may use; `bos_token` and the like."""
    texts = {}
    for name, token in _tokenizer_config(folder).items():
        if name.endswith("_token"):
            text = token.get("content") if isinstance(token, dict) else token
            texts[name] = text if isinstance(text, str) else ""
    return {"bos_token": "", "eos_token": ""} | texts


def _render(
    template: str, tokens: dict[str, str], talk: Sequence[tuple[str, str]], refused: str, way_out: str
) -> str:
    messages = [{"role": role, "content": content} for role, content in talk]
    try:
        compiled = _environment().from_string(template)
        return compiled.render(
            messages=messages, add_generation_prompt=True, tools=None, documents=None, **tokens
        )
    except Exception as error:  # a template is a program of somebody else's
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        other = f", or {way_out}" if way_out else ""
        raise ConfigError(f"{refused} ({said}); use a model whose template takes it{other}") from error


def _environment() -> Environment:
    """Jinja as transformers sets it up for chat templates. Its own function would cost the import of
    transformers, several seconds."""
    from datetime import datetime

    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, by which some templates mark what an assistant says; its content is kept."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = json.dumps
    environment.globals["raise_exception"] = raise_exception
    environment.globals[CLOCK] = lambda form: datetime.now().strftime(form)
    return environment
