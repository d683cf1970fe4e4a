"""`check=true`: the resolved arithmetic of a run, printed without importing torch, ray or vllm."""

from __future__ import annotations

import os

from rlver_dist.cluster.layout import resolve_layout
from rlver_dist.config.enums import Device, LlmCalls, SimulatorBackend
from rlver_dist.config.run import RunConfig
from rlver_dist.data.persona import Persona


def describe(config: RunConfig, train: list[Persona], evaluation: list[Persona]) -> str:
    """Dialogues, turns, token budgets, optimizer steps and placement of `config`, as text."""
    rollout, algorithm, model = config.rollout, config.algorithm, config.model
    dialogues = rollout.dialogues_per_iteration
    turns = dialogues * rollout.max_turns
    evaluated, steps = min(config.evaluation.num_personas, len(evaluation)), algorithm.updates_per_iteration
    policy_moves = config.num_iterations - (config.critic.pretrain_iterations if config.has_critic else 0)
    thinking = ", thinking first" if rollout.think else ""
    lines = [
        (
            f"model                 {model.path} ({model.dtype.value}), context {model.max_context_tokens} "
            f"tokens"
        ),
        f"personas              {len(train)} training, {evaluated} of {len(evaluation)} evaluation",
        f"users                 preset {config.simulator.preset.value}, {_speaker(config)}",
        f"an iteration          {config.num_personas} personas x {algorithm.group_size} dialogues = "
        f"{dialogues} dialogues, "
        f"up to {turns} turns of up to {rollout.max_turn_tokens} tokens{thinking}",
        (
            f"tokens an iteration   at most {turns * rollout.max_turn_tokens} sampled; a dialogue at most "
            f"{model.max_context_tokens}"
        ),
        f"optimizer steps       {steps} an iteration, {steps * policy_moves} in all, "
        f"lr {config.learner.lr:g} after {config.learner.warmup_steps} warm-up steps",
        (
            f"micro-batches         packed rows of up to {config.learner.micro_batch_tokens} tokens, ZeRO "
            f"{config.learner.zero_stage}"
        ),
        (
            f"evaluation            {config.evaluation.num_personas} dialogues of up to "
            f"{config.evaluation.max_turns} turns, before and after"
        ),
        (
            f"iterations            {config.num_iterations}, checkpoint every "
            f"{config.save_every or config.num_iterations}"
        ),
        f"output                {config.output_dir}",
    ]
    if config.has_critic:
        lines.insert(6, _critic(config))
    if rollout.think and config.warm_up.dialogues:
        lines.insert(
            3,
            f"warm-up               the think format, on replies of {config.warm_up.dialogues} dialogues of "
            f"the model's own",
        )
    return "\n".join(lines + [f"placement             {row}" for row in _placement(config)])


def _speaker(config: RunConfig) -> str:
    """What speaks for the users, and how often it is asked."""
    simulator = config.simulator
    if simulator.backend is SimulatorBackend.embedded:
        return "rules on sentence embeddings"
    turns = config.rollout.dialogues_per_iteration * config.rollout.max_turns
    calls = turns * simulator.judges + (turns if simulator.llm.calls is LlmCalls.two else 0)
    model = simulator.openai.model if simulator.backend is SimulatorBackend.openai else simulator.engine.model
    return f"spoken for by {model} ({simulator.backend.value}), up to {calls} calls an iteration"


def _critic(config: RunConfig) -> str:
    critic = config.critic
    layers = f"{critic.num_layers} layers" if critic.num_layers else "all layers"
    pretrain = (
        f", alone for the first {critic.pretrain_iterations} iterations" if critic.pretrain_iterations else ""
    )
    steps = critic.epochs * config.algorithm.updates_per_iteration
    rows = f"rows of up to {critic.micro_batch_tokens} tokens, ZeRO {critic.zero_stage}"
    return (
        f"critic                {layers}, trunk {critic.trunk.value}, {rows}, {steps} steps an iteration, "
        f"lr {critic.lr:g}{pretrain}"
    )


def _placement(config: RunConfig) -> list[str]:
    cluster = config.cluster
    if cluster.device is not Device.cpu and cluster.engines == 0:
        learners = "the learners, policy and critic alike" if config.has_critic else "the learner"
        users = "a quarter for the users' engines; of the rest " if config.simulator.uses_engines else ""
        return [
            f"derived at launch from the GPUs that Ray sees: {users}half for engines, half for {learners}"
        ]
    cores = os.cpu_count() or 1
    # A GPU placement is printed as if its GPUs were there; launching compares it with what Ray sees.
    layout = resolve_layout(config, num_gpus=1_000_000, num_cpus=cores)
    needs = (
        f"{layout.num_gpus:g} GPUs: {layout.split}"
        if layout.device == "gpu"
        else f"{cores} CPU cores of this machine"
    )
    return [f"needs {needs}", *layout.rows()]
