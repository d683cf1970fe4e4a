"""`check=true`: the resolved arithmetic of a run, printed without importing torch, ray or vllm."""

from __future__ import annotations

from rlver_dist.cluster.layout import Layout, resolve_layout
from rlver_dist.config.enums import Device, LlmCalls, SimulatorBackend
from rlver_dist.config.learner import CriticConfig
from rlver_dist.config.machine import available_cores
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.data.persona import Persona


def describe(config: RunConfig, train: list[Persona], evaluation: list[Persona]) -> str:
    """Dialogues, turns, token budgets, optimizer steps and placement of `config`, as text."""
    rollout, algorithm, model = config.rollout, config.algorithm, config.model
    dialogues = rollout.dialogues_per_iteration
    turns = dialogues * rollout.max_turns
    evaluated = min(config.evaluation.num_personas, len(evaluation))
    steps = algorithm.updates_per_iteration
    # While the critic learns alone the policy makes no step.
    policy_moves = config.num_iterations - (config.critic.pretrain_iterations if config.has_critic else 0)
    thinking = ", thinking first" if rollout.think else ""
    lines = [
        (
            f"model                 {model.path} ({model.dtype.value}), context {model.max_context_tokens} "
            f"tokens"
        ),
        f"personas              {len(train)} training, {evaluated} of {len(evaluation)} evaluation",
        f"users                 preset {config.simulator.preset.value}, {_speaker(config.simulator, turns)}",
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
    # Beside what they belong to: the critic below the policy's steps, the warm-up above an iteration.
    if config.has_critic:
        lines.insert(6, _critic(config.critic, steps))
    if rollout.think and config.warm_up.dialogues:
        lines.insert(
            3,
            f"warm-up               the think format, on replies of {config.warm_up.dialogues} dialogues of "
            f"the model's own",
        )
    if config.cluster.device is not Device.cpu and config.cluster.engines == 0:
        placement = [_derived_placement(config.has_critic, config.simulator.uses_engines)]
    else:
        # A GPU placement is printed as if its GPUs were there; launching compares it with what Ray sees.
        cores = available_cores()
        placement = _placement(resolve_layout(config, num_gpus=1_000_000, num_cpus=cores), cores)
    return "\n".join(lines + [f"placement             {row}" for row in placement])


def _speaker(simulator: SimulatorConfig, turns: int) -> str:
    """What speaks for the users, and how often it is asked in an iteration of so many turns."""
    if simulator.backend is SimulatorBackend.embedded:
        return "rules on sentence embeddings"
    # Each judge appraises each reply; with one call for both, the first judge's call holds the answer, too.
    calls = turns * simulator.judges + (turns if simulator.llm.calls is LlmCalls.two else 0)
    model = simulator.openai.model if simulator.backend is SimulatorBackend.openai else simulator.engine.model
    return f"spoken for by {model} ({simulator.backend.value}), up to {calls} calls an iteration"


def _critic(critic: CriticConfig, updates: int) -> str:
    """The critic and its steps, where the policy makes `updates` an iteration."""
    layers = f"{critic.num_layers} layers" if critic.num_layers else "all layers"
    pretrain = (
        f", alone for the first {critic.pretrain_iterations} iterations" if critic.pretrain_iterations else ""
    )
    steps = critic.epochs * updates
    rows = f"rows of up to {critic.micro_batch_tokens} tokens, ZeRO {critic.zero_stage}"
    return (
        f"critic                {layers}, trunk {critic.trunk.value}, {rows}, {steps} steps an iteration, "
        f"lr {critic.lr:g}{pretrain}"
    )


def _derived_placement(has_critic: bool, has_user_engines: bool) -> str:
    """What is known of a placement before Ray has been asked for its GPUs."""
    learners = "the learners, policy and critic alike" if has_critic else "the learner"
    users = "a quarter for the users' engines; of the rest " if has_user_engines else ""
    return f"derived at launch from the GPUs that Ray sees: {users}half for engines, half for {learners}"


def _placement(layout: Layout, cores: int) -> list[str]:
    """What a layout needs, and where everything goes."""
    needs = (
        f"{layout.num_gpus:g} GPUs: {layout.split}"
        if layout.device == "gpu"
        else f"{cores} CPU cores of this machine"
    )
    return [f"needs {needs}", *layout.rows()]
