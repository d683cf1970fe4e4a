"""Writes the personas of a plan by a chat model: asks, checks, tries again, and keeps what is new.

Nothing here decides by the order in which answers come, except which of two near duplicates is kept: the
first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from rlver_dist.chat_client.protocol import ChatAnswer, ChatBackend, ChatRequest
from rlver_dist.concurrency import all_or_none
from rlver_dist.data.persona import Persona
from rlver_dist.errors import BoundaryError
from rlver_dist.persona_synthesis import prompts
from rlver_dist.persona_synthesis.journal import ACCEPTED, Entry, Journal
from rlver_dist.persona_synthesis.schema import (
    Fields,
    Reason,
    RejectedError,
    parse_person,
    parse_scene,
    person_schema,
    scene_schema,
)
from rlver_dist.persona_synthesis.seeds import Slot, Subject, subject
from rlver_dist.persona_synthesis.similarity import MOST_SIMILAR, Embed, Index
from rlver_dist.text import words

MAX_FAILED_IN_A_ROW = 10
"""Failed calls without an answer between them, after which the backend counts as gone."""


class Step(str, Enum):
    """The two calls of a persona."""

    PERSON = "person"
    SCENE = "scene"


MAX_TOKENS = {Step.PERSON: 1200, Step.SCENE: 4000}
"""Most tokens of an answer, JSON included."""


@dataclass(kw_only=True, slots=True, frozen=True)
class WriterSettings:
    """How to ask.

    Attributes:
        seed: of the plan and of the sampling.
        attempts: most calls of each step of a persona, in one build.
        temperature: of the sampling.
        concurrency: personas in work at a time.
    """

    seed: int
    attempts: int
    temperature: float
    concurrency: int


class PersonaWriter:
    """Fills the slots of a plan; what the journal already holds is taken from there."""

    def __init__(
        self, *, slots: Sequence[Slot], journal: Journal, embed: Embed, settings: WriterSettings
    ) -> None:
        self.slots = slots
        self.indexes = {Step.PERSON: Index(embed), Step.SCENE: Index(embed)}
        """Accepted person sheets and scenes."""
        self._written: dict[Step, dict[str, Fields]] = {step: {} for step in Step}
        self._journal = journal
        self._settings = settings
        self._calls: Counter[tuple[str, Step]] = Counter()
        self._draws: Counter[str] = Counter()
        self._openings: set[str] = set()
        self._failed_in_a_row = 0
        by_id = {slot.id: slot for slot in slots}
        for entry in journal.entries:
            self._replay(by_id[entry.slot], entry)

    async def run(self, backend: ChatBackend, on_written: Callable[[Slot], None]) -> None:
        """Try to fill every open slot; those whose attempts are used up stay open.

        Raises:
            BoundaryError: the backend does not answer any more.
            BudgetError: tokens, money or quota are used up.
        """
        # One generator for all workers: each takes the next open slot when it is free.
        waiting = (slot for slot in self.slots if self.persona(slot) is None)
        await all_or_none(self._work(waiting, backend, on_written) for _ in range(self._settings.concurrency))

    def persona(self, slot: Slot) -> Persona | None:
        """The finished persona of `slot`; None as long as a part of it is missing."""
        person, scene = (self._written[step].get(slot.id) for step in Step)
        return prompts.persona(slot, person, scene) if person and scene else None

    def theme(self, slot: Slot) -> str:
        """What the scene of `slot` is about now."""
        return self._subject(slot).theme

    async def _work(
        self, waiting: Iterator[Slot], backend: ChatBackend, on_written: Callable[[Slot], None]
    ) -> None:
        for slot in waiting:
            if await self._fill(slot, Step.PERSON, backend) and await self._fill(slot, Step.SCENE, backend):
                on_written(slot)

    async def _fill(self, slot: Slot, step: Step, backend: ChatBackend) -> bool:
        """Ask until an answer is taken or the attempts are used up; False in the latter case."""
        for _ in range(self._settings.attempts):
            if slot.id in self._written[step]:
                break
            await self._try(slot, step, backend)
        return slot.id in self._written[step]

    async def _try(self, slot: Slot, step: Step, backend: ChatBackend) -> None:
        request = self._request(slot, step)
        try:
            answer = await backend.ask(request)
        except BoundaryError as error:
            self._keep(
                Entry(
                    slot=slot.id,
                    step=step.value,
                    verdict=Reason.CALL_FAILED.value,
                    detail=_line(str(error)),
                    content=None,
                ),
                slot,
            )
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                raise BoundaryError(
                    f"{self._failed_in_a_row} calls failed in a row, the last: {error}"
                ) from error
            return
        # Any answer shows that the backend lives, whether it is taken or not.
        self._failed_in_a_row = 0
        try:
            content = self._check(slot, step, answer.text)
        except RejectedError as error:
            self._keep(_entry(slot, step, answer, verdict=error.reason.value, detail=error.detail), slot)
        else:
            self._keep(_entry(slot, step, answer, verdict=ACCEPTED, content=content), slot)

    def _request(self, slot: Slot, step: Step) -> ChatRequest:
        key = f"{slot.id}/{step.value}/{self._calls[slot.id, step]}"
        if step is Step.PERSON:
            messages, schema = prompts.person_messages(slot), person_schema(slot.language)
        else:
            person = self._written[Step.PERSON][slot.id]
            messages, schema = (
                prompts.scene_messages(slot, person, self._subject(slot)),
                scene_schema(slot.language),
            )
        return ChatRequest(
            key=key,
            messages=messages,
            schema_name=step.value,
            schema=schema,
            max_tokens=MAX_TOKENS[step],
            temperature=self._settings.temperature,
            # Not `derive_seed`: a build that goes on from its journal repeats the calls with these bits.
            seed=random.Random(f"{self._settings.seed}:{key}").getrandbits(31),
            affinity=slot.id,
        )

    def _check(self, slot: Slot, step: Step, text: str) -> Fields:
        """The fields of an answer, which no accepted one resembles; raises `RejectedError`."""
        fields = (
            parse_person(text, slot.language, slot.name)
            if step is Step.PERSON
            else parse_scene(text, slot.language)
        )
        # No other answer can come in between: nothing is awaited from here to where the text is accepted.
        score, other = self.indexes[step].nearest(self._vector(slot, step, fields), slot.language)
        if score >= MOST_SIMILAR[slot.language]:
            raise RejectedError(Reason.NEAR_DUPLICATE, f"{score:.2f} to {other}")
        if step is Step.SCENE and _plain(fields["opening"]) in self._openings:
            raise RejectedError(Reason.NEAR_DUPLICATE, "opening: word for word that of another persona")
        return fields

    def _keep(self, entry: Entry, slot: Slot) -> None:
        self._journal.append(entry)
        self._replay(slot, entry)

    def _replay(self, slot: Slot, entry: Entry) -> None:
        """Take in a call that the journal holds."""
        step = Step(entry.step)
        self._calls[slot.id, step] += 1
        # A scene too close to another is not mended by another seed alone: the next one gets another theme.
        self._draws[slot.id] += step is Step.SCENE and entry.verdict == Reason.NEAR_DUPLICATE.value
        if entry.content is None:
            return
        self._written[step][slot.id] = entry.content
        self.indexes[step].add(slot.id, self._vector(slot, step, entry.content), slot.language)
        if step is Step.SCENE:
            self._openings.add(_plain(entry.content["opening"]))

    def _vector(self, slot: Slot, step: Step, fields: Fields) -> np.ndarray:
        text = "\n".join(fields.values()) if step is Step.PERSON else prompts.scene(slot.language, fields)
        return self.indexes[step].vector(text, language=slot.language, name=slot.name)

    def _subject(self, slot: Slot) -> Subject:
        return subject(slot, draw=self._draws[slot.id], seed=self._settings.seed)


def _entry(
    slot: Slot,
    step: Step,
    answer: ChatAnswer,
    *,
    verdict: str,
    detail: str = "",
    content: Fields | None = None,
) -> Entry:
    return Entry(
        slot=slot.id,
        step=step.value,
        verdict=verdict,
        detail=detail,
        content=content,
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        completion_tokens=answer.completion_tokens,
        seconds=answer.seconds,
        model=answer.model,
    )


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def _plain(text: str) -> str:
    return " ".join(words(text))
