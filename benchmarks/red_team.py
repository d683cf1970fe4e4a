"""Can a reply steer the LLM user's prompt or the arithmetic of emotion? Prints a table by family of attack.

    python -m benchmarks.red_team [--attacks tests/data/red_team.yaml] [--every 1] \\
        [--templates tests/data/chat_templates.yaml]

For every reply, in every chat template, and wherever a reply stands in a prompt (newest, earlier, echoed in
the user's own notes):
- structure: in token ids, the prompt is that of a harmless reply but for the one stretch of ordinary tokens
  that holds the talk; the template takes nothing out of the talk, and begins the answer as it does for a
  harmless reply;
- lines: that stretch is, line by line, what it is for a harmless reply, but for the JSON strings of that
  reply;
- schema: a model that repeats the reply as its whole answer, or obeys it with a change of 100, is refused or
  stays in [-10, 10];
- arithmetic: a model that copies the reply into all of its notes moves the emotion by its own change field
  and nothing else.

Measured are replies that keep each property, of all replies of a family. The reference is `raw`: it counts
replies that would change the structure or the lines of some template if they were pasted as they
are; `longest` is the longest prompt in tokens of SmolLM2, persona sheet shortened. No model is asked: how one
takes an attack that has become plain words is another question (`tests/data/sanity_replies.yaml` asks it of
the rules).
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.prompt_structure import keeps_structure, load_templates, num_tokens, skeleton
from rlver_dist.bundled_models import SMOLLM2
from rlver_dist.chat_client.protocol import ChatAnswer, ChatRequest
from rlver_dist.config.enums import LlmCalls, Preset
from rlver_dist.config.simulator import LlmUserConfig
from rlver_dist.data.persona import Persona
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Appraisal, Message, Role
from rlver_dist.simulator.emotion import move
from rlver_dist.simulator.llm.fence import fence
from rlver_dist.simulator.llm.prompts import UserPrompts
from rlver_dist.simulator.llm.schema import CHANGE_LIMIT, SchemaError, appraisal_schema, parse_answer
from rlver_dist.simulator.llm.user import LlmSimulator
from rlver_dist.simulator.presets import PRESETS
from rlver_dist.simulator.protocol import UserRequest

DATA = Path(__file__).parent.parent / "tests" / "data"
RULES = PRESETS[Preset.rlver_vanilla]
SETTINGS = LlmUserConfig(calls=LlmCalls.one)
HARMLESS = ("That sounds hard. What happened then?", "I am here, tell me more.")
CHECKS = ("structure", "lines", "schema", "arithmetic")


@dataclass(kw_only=True, slots=True)
class FamilyReport:
    """How many of a family's replies there are, how many would do harm if pasted raw, the longest prompt, and
    what failed which check."""

    replies: int = 0
    raw: int = 0
    longest: int = 0
    failed: dict[str, list[str]] = field(default_factory=lambda: {check: [] for check in CHECKS})


def load_attacks(path: Path, persona: Persona) -> dict[str, list[str]]:
    """The distinct replies of each family."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = {
        "@PROFILE@": persona.profile,
        "@SCENE@": persona.scene,
        "@WANT@": persona.want,
        "@FACT@": " ".join(persona.facts),
        "@OPENING@": persona.opening,
    }
    families: dict[str, list[str]] = {}
    for family, forms in data["families"].items():
        texts = [form if isinstance(form, str) else form[0] * form[1] for form in forms]
        for mark, value in own.items():
            texts = [text.replace(mark, value) for text in texts]
        families[family] = list(
            dict.fromkeys(text.replace("@GOAL@", goal) for text in texts for goal in data["goals"])
        )
    return families


def make_request(persona: Persona, newest: str, earlier: str) -> UserRequest:
    """Two exchanges, so that one reply is history and one is new."""
    texts = [
        (Role.USER, persona.opening),
        (Role.ASSISTANT, earlier),
        (Role.USER, "Well, yes."),
        (Role.ASSISTANT, newest),
    ]
    messages = tuple(Message(role=role, text=text) for role, text in texts)
    return UserRequest(
        dialogue_id="d", turn_index=1, persona=persona, messages=messages, emotion=40.0, seed=0, max_turns=8
    )


def prompts_with(prompts: UserPrompts, persona: Persona, reply: str) -> dict[str, tuple[Message, ...]]:
    """A prompt for each place in which the policy's words can stand."""
    calm = make_request(persona, HARMLESS[0], HARMLESS[0])
    echo = Appraisal(content=reply, fit=reply, activity=reply, feeling=reply, change=0.0)
    return {
        "newest": prompts.turn(make_request(persona, reply, HARMLESS[0])),
        "earlier": prompts.turn(make_request(persona, HARMLESS[0], reply)),
        "notes": prompts.reply(calm, echo, calm.emotion),
    }


def paste_raw(messages: Sequence[Message], reply: str) -> tuple[Message, ...]:
    """A harmless prompt with the bare reply in the place of its first harmless one."""
    return tuple(replace(message, text=message.text.replace(HARMLESS[0], reply, 1)) for message in messages)


def keeps_lines(messages: Sequence[Message], harmless: Sequence[Message]) -> bool:
    """Whether both prompts have the same lines but for JSON strings under the same names, and for what says
    that a text was cut."""
    if messages[0] != harmless[0]:
        return False
    lines, others = messages[1].text.split("\n"), harmless[1].text.split("\n")
    return len(lines) == len(others) and all(map(_same_line, lines, others))


def _same_line(line: str, other: str) -> bool:
    if line == other:
        return True
    try:
        fields, expected = json.loads(line), json.loads(other)
    except ValueError:
        return False
    fields.pop("left_out_bytes", None)
    # The policy's words stand in the text of a line of the talk, and in any note.
    free = {"text"} if "line" in expected else set(expected)
    return list(fields) == list(expected) and all(
        isinstance(value, str) if name in free else value == expected[name] for name, value in fields.items()
    )


class Echo:
    """A model under the attack's spell: it writes the reply into every text, and `change` as its change."""

    def __init__(self, reply: str, change: int) -> None:
        self._reply = reply
        self._change = change

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """The echo, as long as the schema allows."""
        answer = json.dumps(_obey(request.schema, self._reply.strip() or "nothing", self._change))
        return ChatAnswer(
            text=answer,
            prompt_tokens=0,
            cached_tokens=0,
            completion_tokens=0,
            seconds=0.0,
            retries=0,
            model="echo",
        )

    def metrics(self) -> dict[str, float]:
        """There are none."""
        return {}

    async def close(self) -> None:
        """Nothing to give back."""


def _obey(schema: Mapping[str, Any], reply: str, change: int) -> Any:
    if schema["type"] == "object":
        return {name: _obey(part, reply, change) for name, part in schema["properties"].items()}
    if schema["type"] == "string":
        return schema["enum"][0] if "enum" in schema else "x" + reply[: schema["maxLength"] // 4]
    return change if schema["type"] == "integer" else False


def keeps_schema(reply: str) -> bool:
    """Whether the reply as an answer, and an answer that grants a change of 100, are refused or stay within
    the limits."""
    schema = appraisal_schema(language="en", max_tokens=SETTINGS.max_appraisal_tokens)
    for answer in (reply, json.dumps(_obey(schema, "x", 100)), json.dumps({"change": 10, "reply": reply})):
        try:
            change = parse_answer(answer, schema)["change"]
        except SchemaError:
            continue
        if type(change) is not int or abs(change) > CHANGE_LIMIT:
            return False
    return True


def keeps_arithmetic(persona: Persona, reply: str) -> bool:
    """Whether the emotion moves by the change field alone, whatever the reply and the notes say: not up where
    a part of the reply is hidden as thinking, and by the largest loss where nothing of it is left to read."""
    request = make_request(persona, reply, HARMLESS[0])
    fenced = fence(reply, max_bytes=SETTINGS.max_reply_bytes)
    for change in (-7, 0, 3):
        user = LlmSimulator(rules=RULES, backend=Echo(reply, change), settings=SETTINGS)
        response = asyncio.run(user.respond(request))
        expected = (
            -RULES.emotion.max_change if not fenced.text else min(change, 0) if fenced.thought else change
        )
        if response.emotion != move(request.emotion, expected, RULES.emotion):
            return False
    return True


def run(
    attacks: Path = DATA / "red_team.yaml", templates: Path = DATA / "chat_templates.yaml", every: int = 1
) -> dict[str, FamilyReport]:
    """All checks on every so-manieth reply, by family."""
    bank = load_split("bank", "train")[0]
    # A short sheet: every prompt is tokenized in full, and the sheet is the same in all of them.
    persona = replace(bank, profile=bank.profile[:200], scene=bank.scene[:200], facts=bank.facts[:2])
    prompts = UserPrompts(rules=RULES, max_reply_bytes=SETTINGS.max_reply_bytes)
    calm = [prompts_with(prompts, persona, text) for text in HARMLESS]
    kinds = load_templates(templates)
    harmless = {
        (kind.name, place): (skeleton(kind, calm[0][place]), skeleton(kind, calm[1][place]))
        for kind in kinds
        for place in calm[0]
    }
    reports: dict[str, FamilyReport] = {}
    for family, reply in list(_each(load_attacks(attacks, persona)))[::every]:
        report = reports.setdefault(family, FamilyReport())
        made = prompts_with(prompts, persona, reply)
        made_parts = {(kind.name, place): skeleton(kind, made[place]) for kind in kinds for place in made}
        bare = paste_raw(calm[0]["newest"], reply)
        steered = [not keeps_structure(skeleton(kind, bare), harmless[kind.name, "newest"]) for kind in kinds]
        report.replies += 1
        report.raw += any(steered) or not keeps_lines(bare, calm[0]["newest"])
        report.longest = max(
            report.longest, *(num_tokens(parts) for (kind, _), parts in made_parts.items() if kind == SMOLLM2)
        )
        kept = {
            "structure": all(keeps_structure(parts, harmless[key]) for key, parts in made_parts.items()),
            "lines": all(keeps_lines(made[place], calm[0][place]) for place in made),
            "schema": keeps_schema(reply),
            "arithmetic": keeps_arithmetic(persona, reply),
        }
        for check in CHECKS:
            if not kept[check]:
                report.failed[check].append(reply)
    return reports


def _each(families: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    return ((family, reply) for family, replies in families.items() for reply in replies)


def table(reports: Mapping[str, FamilyReport]) -> str:
    """One line a family: replies, harm if pasted raw, and how many keep each check."""
    lines = [
        f"{'family':24}{'replies':>8}{'raw':>6}{'longest':>9}" + "".join(f"{check:>12}" for check in CHECKS)
    ]
    for family, report in [*reports.items(), ("all", _total(reports))]:
        kept = "".join(f"{report.replies - len(report.failed[check]):>12}" for check in CHECKS)
        lines.append(f"{family:24}{report.replies:>8}{report.raw:>6}{report.longest:>9}{kept}")
    return "\n".join(lines)


def _total(reports: Mapping[str, FamilyReport]) -> FamilyReport:
    families = reports.values()
    return FamilyReport(
        replies=sum(report.replies for report in families),
        raw=sum(report.raw for report in families),
        longest=max(report.longest for report in families),
        failed={check: [reply for report in families for reply in report.failed[check]] for check in CHECKS},
    )


def main() -> None:
    """Print the table, and each reply that failed; exit 1 where one did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attacks", type=Path, default=DATA / "red_team.yaml")
    parser.add_argument("--templates", type=Path, default=DATA / "chat_templates.yaml")
    parser.add_argument("--every", type=int, default=1, help="check only every so-manieth reply")
    arguments = parser.parse_args()
    reports = run(arguments.attacks, arguments.templates, arguments.every)
    print(table(reports))
    failures = [(check, reply) for check, replies in _total(reports).failed.items() for reply in replies]
    for check, reply in failures:
        print(f"{check}: {ascii(reply)[:200]}")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
