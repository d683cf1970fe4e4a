"""Personas written by a chat model from seeds, checked, balanced and split; an interrupted build goes on with
the same command.

    python -m rlver_dist.persona_synthesis --out FOLDER [--train 240] [--evaluation 100] \\
        [--languages en,zh] simulator=openai simulator.openai.model=NAME

Options of the chat model are those of training, `simulator.engine.*` and `simulator.openai.*` (see
`config/simulator.py`). FOLDER gets `train.jsonl` and `evaluation.jsonl` for `data.train` and
`data.evaluation`, `report.md` and `report.json`, and `journal.jsonl` with every call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlver_dist.chat_client.budget import Prices
from rlver_dist.chat_client.protocol import ChatBackend
from rlver_dist.config.enums import SimulatorBackend
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.data.personas import dump_personas
from rlver_dist.data.situations import SPLITS
from rlver_dist.errors import EXIT_FAILED, ConfigError, exit_code
from rlver_dist.files import write_whole
from rlver_dist.persona_synthesis.backend import open_backend
from rlver_dist.persona_synthesis.journal import Journal
from rlver_dist.persona_synthesis.prompts import digest
from rlver_dist.persona_synthesis.report import make_report, render
from rlver_dist.persona_synthesis.seeds import LANGUAGES, Slot, plan
from rlver_dist.persona_synthesis.similarity import Embed
from rlver_dist.persona_synthesis.writer import PersonaWriter, WriterSettings
from rlver_dist.simulator.rules.embedding import SentenceEncoder

JOURNAL = "journal.jsonl"
OPTIONS = ("simulator.backend=", "simulator.engine.", "simulator.openai.")
"""What of the simulated users' configuration is about the chat model; the rest is about the users."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; `overrides` holds what stands as `key=value`."""
    parser = argparse.ArgumentParser(
        prog="python -m rlver_dist.persona_synthesis", description="Write personas by a chat model."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write to; one with a journal is gone on with"
    )
    parser.add_argument("--train", type=_whole(0), default=240, help="training personas (default 240)")
    parser.add_argument("--evaluation", type=_whole(0), default=100, help="evaluation personas (default 100)")
    parser.add_argument(
        "--languages",
        type=_languages,
        default=["en"],
        help="en, zh or en,zh, which share both splits evenly (default en)",
    )
    parser.add_argument(
        "--seed", type=_whole(0), default=1, help="of the plan and of the sampling (default 1)"
    )
    parser.add_argument(
        "--attempts",
        type=_whole(1),
        default=4,
        help="most calls for a person sheet, and for a scene (default 4)",
    )
    parser.add_argument("--temperature", type=float, default=0.9, help="of the sampling (default 0.9)")
    parser.add_argument(
        "--concurrency", type=_whole(1), default=8, help="personas in work at a time (default 8)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="simulator.KEY=VALUE",
        help="options of the chat model, as in training",
    )
    return parser.parse_args(arguments)


def simulator_config(overrides: Sequence[str]) -> SimulatorConfig:
    """The chat model's options; `simulator=NAME` is short for `simulator.backend=NAME`, as in training.

    Raises:
        ConfigError: an option is unknown, its value is refused, or the backend is not one that writes.
    """
    prefix = "simulator="
    dotted = [
        f"simulator.backend={item.removeprefix(prefix)}" if item.startswith(prefix) else item
        for item in overrides
    ]
    for item in dotted:
        if "=" not in item or not item.startswith(OPTIONS):
            raise ConfigError(
                f"{item}: not an option of the chat model that writes; use "
                f"{', '.join(f'{start}...' for start in OPTIONS)}"
            )
    try:
        schema = OmegaConf.create({"simulator": OmegaConf.structured(SimulatorConfig)})
        config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.from_dotlist(dotted)).simulator)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{' '.join(dotted)}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, SimulatorConfig)
    if config.backend is SimulatorBackend.embedded:
        raise ConfigError(
            "simulator.backend=embedded: rules write no personas; use simulator=openai or simulator=vllm, "
            "or python -m rlver_dist.data.bank_builder for the hand-written bank"
        )
    return config


def build(
    options: argparse.Namespace,
    *,
    backend: AbstractAsyncContextManager[ChatBackend],
    embed: Embed,
    prices: Prices,
) -> int:
    """Build or go on building; `backend` is opened only if something is left to write.

    Returns:
        The exit code, 0 only if every planned persona is written.

    Raises:
        UserError: something that the user can mend; what was written stays in the journal.
        BoundaryError: the backend does not answer any more; likewise.
    """
    slots = plan(
        sizes={split: getattr(options, split) for split in SPLITS},
        languages=options.languages,
        seed=options.seed,
    )
    if not slots:
        raise ConfigError("--train and --evaluation: both are 0; ask for at least one persona")
    header = {name: getattr(options, name) for name in ("train", "evaluation", "languages", "seed")} | {
        "prompts": digest()
    }
    settings = WriterSettings(
        seed=options.seed,
        attempts=options.attempts,
        temperature=options.temperature,
        concurrency=options.concurrency,
    )
    with Journal(options.out / JOURNAL, header) as journal:
        writer = PersonaWriter(slots=slots, journal=journal, embed=embed, settings=settings)
        held = sum(writer.persona(slot) is not None for slot in slots)
        if held:
            print(f"{options.out / JOURNAL}: {held} of {len(slots)} personas are there", file=sys.stderr)
        if held < len(slots):
            asyncio.run(_write(writer, backend, _Progress(held, len(slots))))
        report = make_report(writer, journal.entries, prices)
    for split in SPLITS:
        if personas := [
            persona for slot in slots if slot.split == split and (persona := writer.persona(slot))
        ]:
            write_whole(options.out / f"{split}.jsonl", dump_personas(personas))
    write_whole(options.out / "report.json", json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    write_whole(options.out / "report.md", render(report))
    print(render(report), end="")
    if report["missing"]:
        print(
            f"{len(report['missing'])} personas are missing; the same command tries them again",
            file=sys.stderr,
        )
    return EXIT_FAILED if report["missing"] else 0


async def _write(
    writer: PersonaWriter, backend: AbstractAsyncContextManager[ChatBackend], on_written: _Progress
) -> None:
    async with backend as opened:
        await writer.run(opened, on_written)


class _Progress:
    """Prints how far a build is, at most 20 times."""

    def __init__(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def __call__(self, slot: Slot) -> None:
        self._done += 1
        if self._done % -(-self._total // 20) == 0:
            print(f"{self._done} of {self._total} personas, the last {slot.id}", file=sys.stderr, flush=True)


def _whole(least: int) -> Callable[[str], int]:
    """Parses a whole number from `least` on, for argparse."""

    def whole(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return number

    return whole


def _languages(text: str) -> list[str]:
    languages = text.split(",")
    if len(set(languages)) < len(languages) or not set(languages) <= set(LANGUAGES):
        raise argparse.ArgumentTypeError(
            f"{text!r}: use one or both of {', '.join(LANGUAGES)}, comma-separated"
        )
    return languages


def _build(options: argparse.Namespace) -> int:
    """`build` with the chat model and the encoder that the command line asks for."""
    config = simulator_config(options.overrides)
    encoder = SentenceEncoder()
    return build(
        options,
        backend=open_backend(config, seed=options.seed, concurrency=options.concurrency),
        embed=lambda sentences: encoder.vectors(sentences).numpy(),
        prices=Prices.of(config.openai),
    )


def main() -> None:
    """Command line."""
    options = parse_arguments(sys.argv[1:])
    # A script starts what runs in the background with SIGINT ignored, and SIGTERM goes its way here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(exit_code(lambda: _build(options), kept="what is written is kept, and the same command goes on"))


if __name__ == "__main__":
    main()
