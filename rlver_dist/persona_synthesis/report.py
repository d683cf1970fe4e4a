"""The quality report of a build: what was written, how it is spread, how alike it is, what was rejected, and
what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from rlver_dist.chat_client.budget import Prices
from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.data.personas import shared_people
from rlver_dist.data.situations import SPLITS
from rlver_dist.latency import nearest_rank
from rlver_dist.persona_synthesis.journal import ACCEPTED, Entry
from rlver_dist.persona_synthesis.seeds import Slot
from rlver_dist.persona_synthesis.similarity import MOST_SIMILAR
from rlver_dist.persona_synthesis.writer import PersonaWriter, Step

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
NUM_EXAMPLES = 3
"""Details shown for each reason of rejection."""

Report = dict[str, Any]


def make_report(writer: PersonaWriter, entries: Sequence[Entry], prices: Prices) -> Report:
    """Figures of the build, JSON-able."""
    written = [(slot, persona) for slot in writer.slots if (persona := writer.persona(slot))]
    splits = {split: [persona for slot, persona in written if slot.split == split] for split in SPLITS}
    themes = {
        split: Counter(writer.theme(slot) for slot, _ in written if slot.split == split) for split in SPLITS
    }
    return {
        "splits": {
            split: _split(split, personas, writer.slots, themes[split]) for split, personas in splits.items()
        },
        "missing": [slot.id for slot in writer.slots if writer.persona(slot) is None],
        "shared_by_splits": {
            "names": len({p.name for p in splits["train"]} & {p.name for p in splits["evaluation"]}),
            "person_sheets": len(shared_people(splits["train"], splits["evaluation"])),
            "themes": len(themes["train"].keys() & themes["evaluation"].keys()),
        },
        "similarity": {
            language: _similarity(writer, language)
            for language in sorted({slot.language for slot in writer.slots})
        },
        "rejected": {
            step.value: _rejected(entry for entry in entries if entry.step == step.value) for step in Step
        },
        "cost": _cost(entries, prices, len(written)),
    }


def render(report: Report) -> str:
    """The report as Markdown."""
    lines = [
        "# Personas written by a chat model",
        "",
        *_render_splits(report),
        *_render_similarity(report),
        *_render_rejected(report),
    ]
    return "\n".join([*lines, *_render_cost(report)]) + "\n"


def _split(split: str, personas: Sequence[Persona], slots: Sequence[Slot], themes: Counter[str]) -> Report:
    cells = Counter((persona.hidden_intent, persona.temperament) for persona in personas)
    every = [cells[intent, temperament] for intent in HiddenIntent for temperament in Temperament]
    return {
        "planned": sum(slot.split == split for slot in slots),
        "written": len(personas),
        "languages": dict(sorted(Counter(persona.language for persona in personas).items())),
        "intents": {
            intent.value: sum(persona.hidden_intent is intent for persona in personas)
            for intent in HiddenIntent
        },
        "temperaments": {
            kind.value: sum(persona.temperament is kind for persona in personas) for kind in Temperament
        },
        "cell_min": min(every),
        "cell_max": max(every),
        "themes": len(themes),
        "theme_max": max(themes.values(), default=0),
        "median_characters": {
            name: median(len(getattr(persona, name)) for persona in personas) if personas else 0
            for name in ("profile", "scene", "opening")
        },
    }


def _similarity(writer: PersonaWriter, language: str) -> Report:
    def of_split(*splits: str) -> set[str]:
        return {slot.id for slot in writer.slots if slot.split in splits}

    every = of_split(*SPLITS)
    train = of_split("train")
    evaluation = of_split("evaluation")
    found: Report = {"limit": MOST_SIMILAR[language]}
    for step, index in writer.indexes.items():
        found[step.value] = _quantiles(
            index.closest(language, of=every.__contains__, among=every.__contains__)
        )
        found[f"{step.value}, evaluation to train"] = _quantiles(
            index.closest(language, of=evaluation.__contains__, among=train.__contains__)
        )
    return found


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Nearest-rank quantiles; None without a value."""
    if not values:
        return None
    ordered = sorted(values)
    return {name: nearest_rank(ordered, quantile) for name, quantile in QUANTILES.items()}


def _rejected(entries: Iterable[Entry]) -> Report:
    calls = 0
    reasons: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for entry in entries:
        calls += 1
        if entry.verdict != ACCEPTED:
            reasons[entry.verdict] += 1
            shown = examples.setdefault(entry.verdict, [])
            if len(shown) < NUM_EXAMPLES:
                shown.append(f"{entry.slot}: {entry.detail}")
    return {
        "calls": calls,
        "rejected": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "examples": examples,
    }


def _cost(entries: Sequence[Entry], prices: Prices, num_personas: int) -> Report:
    prompt, cached, completion = (
        sum(getattr(entry, name) for entry in entries)
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
    )
    money = prices.cost(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)
    answered = [entry.seconds for entry in entries if entry.model]
    return {
        "models": dict(Counter(entry.model for entry in entries if entry.model).most_common()),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "completion_tokens": completion,
        "tokens_per_persona": (prompt + completion) / num_personas if num_personas else None,
        "seconds_per_call": fmean(answered) if answered else None,
        "cost": money,
        "cost_per_1000_personas": 1000 * money / num_personas if num_personas else None,
    }


def _render_splits(report: Report) -> list[str]:
    splits = report["splits"]
    rows = [["", *splits]]
    labels = {
        "cell_min": "least in a cell of intent x temperament",
        "cell_max": "most in a cell",
        "theme_max": "most on one theme",
    }
    for key in ("planned", "written", "cell_min", "cell_max", "themes", "theme_max"):
        rows.append([labels.get(key, key), *(str(split[key]) for split in splits.values())])
    for group in ("languages", "intents", "temperaments", "median_characters"):
        names = (
            sorted({name for split in splits.values() for name in split[group]})
            if group == "languages"
            else list(splits["train"][group])
        )
        prefix = "median characters: " if group == "median_characters" else ""
        rows += [
            [prefix + name, *(f"{split[group].get(name, 0):g}" for split in splits.values())]
            for name in names
        ]
    shared = ", ".join(
        f"{count} {name.replace('_', ' ')}" for name, count in report["shared_by_splits"].items()
    )
    missing = report["missing"]
    listed = f" ({', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''})" if missing else ""
    return [
        *_table(rows),
        "",
        f"Shared by the splits: {shared}. Personas still missing: {len(missing)}{listed}.",
        "",
    ]


def _render_similarity(report: Report) -> list[str]:
    rows = [["similarity to the nearest", *QUANTILES, "limit"]]
    for language, figures in report["similarity"].items():
        for kind, values in figures.items():
            if isinstance(values, dict):
                rows.append(
                    [
                        f"{language} {kind}",
                        *(f"{values[name]:.2f}" for name in QUANTILES),
                        f"{figures['limit']:.2f}",
                    ]
                )
    return [*_table(rows), ""] if len(rows) > 1 else []


def _render_rejected(report: Report) -> list[str]:
    rows = [["call", "made", "rejected", "why"]]
    for step, figures in report["rejected"].items():
        why = ", ".join(f"{reason} {count}" for reason, count in figures["reasons"].items())
        rows.append([step, str(figures["calls"]), str(figures["rejected"]), why])
    shown = [
        f"- {reason}: {detail}"
        for figures in report["rejected"].values()
        for reason, details in figures["examples"].items()
        for detail in details
    ]
    return [*_table(rows), "", *shown, *([""] if shown else [])]


def _render_cost(report: Report) -> list[str]:
    cost = report["cost"]
    rows = [
        ["tokens and cost", ""],
        ["models", ", ".join(f"{name} ({count} calls)" for name, count in cost["models"].items())],
    ]
    for key in (
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "tokens_per_persona",
        "seconds_per_call",
        "cost",
        "cost_per_1000_personas",
    ):
        rows.append([key.replace("_", " "), _figure(cost[key])])
    return _table(rows)


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    # Four digits of a small figure, and never a power of ten.
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
