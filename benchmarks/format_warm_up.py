"""What the warm-up teaches SmolLM2 beside the think format: `warm_up.*` of `+on=cpu` chosen by measurement.

    python -m benchmarks.format_warm_up --dialogues 24 --turns 6 --lr 2e-4 --epochs 2

In one process with a vLLM engine and the learner: holds the warm-up's dialogues, lets the learner imitate
them, and holds eight turns with users of the evaluation split before and after. Columns: share of well-formed
replies of the first three turns and of the later ones, of truncated ones, tokens up to the reply and of the
reply, distinct-2 and the base model's perplexity of what was heard, and the mean change of emotion a reply.
The reference is the base model, without and with the instruction to think (the first two rows): a perplexity
of 19 against its 13 is x 1.5.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import socket
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer

from rlver_dist.bundled_models import resolve
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.enums import Device
from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.config.precision import with_precision
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Dialogue, Turn
from rlver_dist.evaluation.held_out import evaluation_tasks, visible_samples
from rlver_dist.experience.samples import ImitationSample
from rlver_dist.learner.policy import PolicyLearner
from rlver_dist.learner.policy_models import PolicySettings
from rlver_dist.learner.rank import RankPlace
from rlver_dist.rollout.collector import CollectLimits, DialogueTask, RespondFn, collect
from rlver_dist.rollout.engine import EngineSettings, PolicyEngine
from rlver_dist.rollout.renderer import Renderer, system_prompt
from rlver_dist.simulator.presets import resolve_rules
from rlver_dist.simulator.rules.appraisal import EmbeddedAppraiser
from rlver_dist.simulator.rules.user import EmbeddedSimulator
from rlver_dist.simulator.service import RewardService
from rlver_dist.tracking.dialogue_metrics import distinct_n
from rlver_dist.tracking.metrics import reduce_metrics
from rlver_dist.trainer.warm_up import reply_limits, reply_tasks, warm_up_samples

TRAINED_TURNS = 3
"""Turns of a training dialogue in `+on=cpu`."""
MODEL_YAML = Path(__file__).parents[1] / "conf" / "model" / "smollm2_135m_instruct.yaml"


class Measurement:
    """The engine, the users and the dialogues that every choice is measured with."""

    def __init__(self, config: RunConfig, temperature: float, num_personas: int) -> None:
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(config.model.path))
        self.limits = CollectLimits(
            max_turns=8,
            max_reply_tokens=config.rollout.max_turn_tokens,
            max_context_tokens=config.model.max_context_tokens,
            end_on_truncation=False,
            strict_format=False,
            temperature=temperature,
            max_concurrent=64,
            request_timeout_s=600.0,
        )
        self.personas = load_split("bank", "evaluation")[:num_personas]
        self.users = RewardService(
            EmbeddedSimulator(rules=resolve_rules(SimulatorConfig()), appraiser=EmbeddedAppraiser())
        ).respond
        self.engine = PolicyEngine(
            EngineSettings.from_config(
                config.model,
                config.cluster,
                device=Device.cpu,
                seed=0,
                max_concurrent=64,
                cpu_threads=torch.get_num_threads(),
                stop_token_ids=(self.renderer(think=False).end_token_id,),
                weight_transfer="shared_file",
            )
        )
        self.version = self.num_rows = 0

    def renderer(self, *, think: bool) -> Renderer:
        """The policy's renderer with or without thinking."""
        return Renderer(self.tokenizer, system_prompt(self.config.model, think), think)

    async def hold(
        self,
        name: str,
        tasks: list[DialogueTask],
        users: RespondFn,
        limits: CollectLimits,
        renderer: Renderer,
    ) -> list[Dialogue]:
        """`warm_up.RolloutFn`."""
        started = time.monotonic()
        dialogues = await collect(
            tasks, generate=self.engine.generate, respond=users, renderer=renderer, limits=limits
        )
        cut = statistics.fmean(turn.truncated for dialogue in dialogues for turn in dialogue.turns)
        print(f"{name}: {len(tasks)} in {time.monotonic() - started:.0f} s, {cut:.0%} truncated", flush=True)
        return dialogues

    async def samples(self) -> list[ImitationSample]:
        """The warm-up's samples, of the model as it is served now."""
        warm_up = self.config.warm_up
        plain = self.renderer(think=False)
        tasks = reply_tasks(load_split("bank", "train"), warm_up.dialogues, self.config.seed)
        limits = reply_limits(self.limits, warm_up, self.config.rollout)
        return await warm_up_samples(
            await self.hold("warm-up: replies", tasks, self.users, limits, plain),
            tasks=tasks,
            warm_up=warm_up,
            tokenizer=self.tokenizer,
            plain=plain,
            thinking=self.renderer(think=True),
            limits=self.limits,
            collect=self.hold,
        )

    async def serve(self, learner: PolicyLearner) -> None:
        """Let the engine take the learner's weights."""
        self.version += 1
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/weights.safetensors"
            learner.write_weights(path)
            await self.engine.update_from_file(path, self.version)

    async def report(self, name: str, learner: PolicyLearner, *, think: bool, num_shown: int) -> None:
        """Hold the evaluation dialogues and print one row, and some samples."""
        renderer = self.renderer(think=think)
        limits = self.limits
        if not think:
            limits = replace(limits, max_reply_tokens=self.config.rollout.max_reply_tokens)
        self.num_rows += 1
        # Other ids in every row: users answer a dialogue once.
        tasks = evaluation_tasks(self.personas, phase=f"row-{self.num_rows}", seed=self.config.seed)
        dialogues = await collect(
            tasks, generate=self.engine.generate, respond=self.users, renderer=renderer, limits=limits
        )
        turns = [turn for dialogue in dialogues for turn in dialogue.turns]
        thoughts = [turn.thinking_tokens for turn in turns]
        nll, tokens = learner.base_nll(visible_samples(dialogues, self.renderer(think=False)))
        perplexity = math.exp(nll / tokens) if tokens else math.nan
        print(
            f"{name:<24} well-formed {kept(turns, range(TRAINED_TURNS))} then "
            f"{kept(turns, range(TRAINED_TURNS, 8))}  "
            f"truncated {statistics.fmean(turn.truncated for turn in turns):6.1%}  tokens "
            f"{statistics.fmean(thoughts):5.1f} + "
            f"{statistics.fmean(len(turn.reply_ids) - turn.thinking_tokens for turn in turns):5.1f}  "
            f"distinct-2 {distinct_n([turn.reply for turn in turns], 2):.3f}  perplexity {perplexity:.1f}  "
            f"emotion {statistics.fmean(turn.emotion_after - turn.emotion_before for turn in turns):+.2f}",
            flush=True,
        )
        for dialogue in dialogues[:num_shown]:
            print(
                f"    {dialogue.opening}\n    -> {self.tokenizer.decode(dialogue.turns[0].reply_ids)!r}",
                flush=True,
            )


def kept(turns: list[Turn], numbers: range) -> str:
    """Share of well-formed replies among the turns of these numbers."""
    chosen = [turn.well_formed for turn in turns if turn.index in numbers]
    return f"{statistics.fmean(chosen):6.1%}" if chosen else "     -"


def make_learner(config: RunConfig) -> PolicyLearner:
    """One rank, on all cores, started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = PolicySettings(
        model=config.model,
        algorithm=config.algorithm,
        learner=config.learner,
        temperature=config.rollout.temperature,
        seed=config.seed,
    )
    place = RankPlace(rank=0, world_size=1, device=Device.cpu, num_threads=torch.get_num_threads())
    learner = PolicyLearner(settings, place)
    learner.start("127.0.0.1", port)
    return learner


async def measure(arguments: argparse.Namespace) -> None:
    """All rows."""
    model = yaml.safe_load(MODEL_YAML.read_text(encoding="utf-8"))
    if arguments.instruction:
        model["think_instruction"] = arguments.instruction
    warm_up = WarmUpConfig(
        dialogues=arguments.dialogues,
        max_turns=arguments.turns,
        max_thought_tokens=arguments.thought_tokens,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        lr=arguments.lr,
    )
    rollout = RolloutConfig(
        think=True,
        max_reply_tokens=arguments.reply_tokens,
        max_thinking_tokens=arguments.thinking_tokens,
        temperature=arguments.temperature,
    )
    cluster = ClusterConfig(device=Device.cpu, engines=1, learner_ranks=1, kv_cache_gib=1)
    config, _ = with_precision(
        RunConfig(model=ModelConfig(**model), warm_up=warm_up, rollout=rollout, cluster=cluster)
    )
    bench = Measurement(config, arguments.temperature, arguments.personas)
    with ExitStack() as stack:
        stack.callback(bench.engine.close)
        await bench.engine.start()
        learner = make_learner(config)
        stack.callback(learner.close)
        await bench.report("base model, no think", learner, think=False, num_shown=arguments.shown)
        await bench.report("base model, think", learner, think=True, num_shown=arguments.shown)
        samples = await bench.samples()
        print(
            f"{len(samples)} samples of {statistics.fmean(pair.sample.num_trained for pair in samples):.1f} "
            f"trained tokens, such as"
        )
        for sample in (pair.sample for pair in samples[:: max(1, len(samples) // 12)]):
            print("    " + repr(bench.tokenizer.decode(sample.token_ids[sample.loss_mask.index(True) :])))
        started = time.monotonic()
        values = reduce_metrics(learner.imitate(samples, config.warm_up, seed=0))
        spent, steps = time.monotonic() - started, int(values["warm_up/steps"])
        print(f"{spent:.0f} s, {steps} steps, loss {values}")
        await bench.serve(learner)
        await bench.report("warmed up, think", learner, think=True, num_shown=arguments.shown)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure the think format before and after imitation.")
    parser.add_argument("--dialogues", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--thought-tokens", type=int, default=24)
    parser.add_argument("--thinking-tokens", type=int, default=32)
    parser.add_argument("--reply-tokens", type=int, default=56)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--personas", type=int, default=40)
    parser.add_argument("--shown", type=int, default=5)
    parser.add_argument(
        "--instruction",
        default="",
        help="model.think_instruction; by default the model file's or the schema's",
    )
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
