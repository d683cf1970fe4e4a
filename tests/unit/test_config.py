"""Composition: every recipe on every placement, in either order, with one clear line for what is refused."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import CriticTrunk, EndReward, Preset
from rlver_dist.config.run import RunConfig
from rlver_dist.errors import ConfigError
from rlver_dist.launch import CONFIG_DIR, order_overrides, to_config
from rlver_dist.preflight.dry_run import describe
from tests.timing import hang_limit

RECIPES = sorted(path.stem for path in (CONFIG_DIR / "exp").glob("*.yaml"))
PLACEMENTS = sorted(path.stem for path in (CONFIG_DIR / "on").glob("*.yaml"))
PAIRS = list(itertools.product(RECIPES, [None, *PLACEMENTS]))


def composed(*overrides: str) -> RunConfig:
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return to_config(compose("config", overrides=order_overrides(["output_dir=out", *overrides])))


def test_recipes_and_placements_exist():
    assert RECIPES == ["grpo_no_think", "grpo_think", "ppo_no_think", "ppo_think"]
    assert PLACEMENTS == ["cpu", "gpu1", "node8", "nodes4x8", "tiny"]


@pytest.mark.parametrize(("recipe", "placement"), PAIRS)
def test_every_pair_composes_in_either_order(recipe, placement):
    overrides = [f"+exp={recipe}"] + ([f"+on={placement}"] if placement else [])
    assert composed(*overrides) == composed(*reversed(overrides))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_carry_the_papers_values(recipe):
    config = composed(f"+exp={recipe}")
    assert config.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert (config.num_personas, config.algorithm.group_size) == (32, 4 if "grpo" in recipe else 1)
    assert (config.rollout.max_turns, config.rollout.temperature, config.num_iterations) == (8, 1.0, 1000)
    algorithm, thinks = config.algorithm, "no_think" not in recipe
    assert (config.learner.lr, config.learner.grad_clip, config.critic.lr, config.critic.value_clip) == (
        1e-6,
        1.0,
        5e-6,
        0.5,
    )
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.entropy_coef, algorithm.kl_coef) == (
        0.2,
        0.2,
        0.001,
        0.0,
    )
    assert (algorithm.gamma, algorithm.gae_lambda) == (1, 1)
    assert algorithm.whiten_advantages or not config.has_critic
    assert algorithm.end_rewards.malformed is EndReward.zero
    assert config.rollout.think == thinks
    assert config.rollout.max_turn_tokens == (5000 if thinks else 1024)
    assert config.has_critic == ("ppo" in recipe)
    # A turn is a row of its own with thinking, which makes about 8 mini-batches; both schedules go on once an
    # iteration.
    assert algorithm.updates_per_iteration == (8 if thinks else 1)
    assert config.learner.warmup_steps == 20 * algorithm.updates_per_iteration
    assert config.critic.warmup_steps == 50 * algorithm.updates_per_iteration or not config.has_critic


@pytest.mark.parametrize(("recipe", "placement"), PAIRS)
def test_placements_choose_the_critic_and_who_needs_a_warm_up(recipe, placement):
    config = composed(f"+exp={recipe}", *([f"+on={placement}"] if placement else []))
    on_cpu = placement == "cpu"
    assert (config.critic.trunk, config.critic.num_layers) == (
        (CriticTrunk.frozen, 8) if on_cpu else (CriticTrunk.trained, 0)
    )
    assert (config.warm_up.dialogues > 0) == on_cpu
    if on_cpu:
        assert config.algorithm.updates_per_iteration == 1
        # 1 GiB holds 46,592 tokens of this model: 64 dialogues of 1,024 are more.
        assert config.cluster.kv_cache_gib * 46_592 >= config.rollout.max_concurrent * 1024


def test_the_first_command_is_ppo_that_thinks_first_on_this_machines_cpu(tmp_path):
    """In a folder whose set-up is done: a `.venv` with the interpreter of these tests."""
    root, python = CONFIG_DIR.parent, tmp_path / ".venv" / "bin" / "python"
    for folder in (python.parent, tmp_path / "launch"):
        folder.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    shutil.copy(root / "launch" / "local.sh", tmp_path / "launch")
    (tmp_path / "launch" / "setup.sh").touch()
    done = subprocess.run(
        ["bash", "launch/local.sh", "check=true"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
        timeout=hang_limit(120),
    )
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert (
        "smollm2-135m-instruct" in lines["model"]
        and "frozen" in lines["critic"]
        and "thinking first" in done.stdout
    )


def test_a_run_goes_on_only_with_what_its_state_and_its_first_evaluation_fit():
    ppo = composed("+exp=ppo_think")
    changes = {
        "algorithm.name": "+exp=grpo_think",
        "rollout.think": "+exp=ppo_no_think",
        "evaluation.max_turns": "evaluation.max_turns=4",
        "rollout.max_reply_tokens": "rollout.max_reply_tokens=99",
        "model.think_instruction": "model.think_instruction=Think.",
    }
    for key, override in changes.items():
        other = composed(
            *([override] if override.startswith("+exp") else ["+exp=ppo_think", override])
        ).resume_fingerprint
        assert ppo.resume_fingerprint[key] != other[key]
    assert (
        "evaluation.max_turns"
        not in composed("+exp=ppo_think", "evaluation.num_personas=0").resume_fingerprint
    )


def test_a_placement_scales_the_recipe_whatever_the_order():
    config = composed("+on=cpu", "+exp=grpo_no_think")
    assert config.model.path == "smollm2-135m-instruct"
    assert config.num_personas < 32


def test_command_line_wins_over_recipe_and_placement():
    assert composed("learner.lr=0.5", "+on=cpu", "+exp=grpo_no_think").learner.lr == 0.5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("placement", "backend", "users"),
    [
        (None, "embedded", None),
        ("cpu", "embedded", "smollm2-135m-instruct"),
        ("tiny", "embedded", "smollm2-135m-instruct"),
        ("gpu1", "vllm", "Qwen/Qwen2.5-7B-Instruct"),
        ("node8", "vllm", "Qwen/Qwen2.5-14B-Instruct"),
        ("nodes4x8", "vllm", "Qwen/Qwen2.5-32B-Instruct"),
    ],
)
def test_placements_choose_what_speaks_for_the_users_and_recipes_choose_the_rules(
    recipe, placement, backend, users
):
    simulator = composed(f"+exp={recipe}", *([f"+on={placement}"] if placement else [])).simulator
    assert simulator.backend.value == backend
    assert users is None or simulator.engine.model == users
    assert simulator.preset is Preset.rlver_vanilla


@pytest.mark.parametrize(
    ("placement", "backend"), [("cpu", "vllm"), ("node8", "embedded"), ("gpu1", "openai")]
)
def test_the_command_lines_backend_wins_over_the_placements_in_any_order(placement, backend):
    named = ["simulator.openai.model=m"]
    overrides = [
        "+exp=grpo_no_think",
        f"+on={placement}",
        f"simulator={backend}",
        "simulator.preset=rlver_challenging",
        *named,
    ]
    for order in (overrides, overrides[::-1]):
        simulator = composed(*order).simulator
        assert (simulator.backend.value, simulator.preset.value) == (backend, "rlver_challenging")


def test_evaluation_users_share_the_backend_under_sages_rules():
    knobs = ("simulator.preset=rlver_challenging", "simulator.acceptance=0.5", "simulator.start_emotion=20")
    simulator = composed("+on=node8", *knobs).simulator
    evaluation = simulator.for_evaluation()
    assert (evaluation.preset, evaluation.acceptance, evaluation.start_emotion) == (Preset.sage, None, None)
    assert (evaluation.backend, evaluation.engine, evaluation.llm) == (
        simulator.backend,
        simulator.engine,
        simulator.llm,
    )


def test_only_recipe_and_placement_change_places():
    assert order_overrides(["a=1", "+on=cpu", "--cfg", "job", "+exp=x"]) == [
        "a=1",
        "+exp=x",
        "--cfg",
        "job",
        "+on=cpu",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.lr=-1", "learner.lr=-1"),
        ("learner.lr=nan", "learner.lr=nan: use a number above 0"),
        ("algorithm.group_size=1", "algorithm.group_size=1"),
        ("algorithm.clip_low=1.5", "algorithm.clip_low=1.5"),
        ("rollout.temperature=0", "rollout.temperature=0"),
        ("simulator.acceptance=2", "simulator.acceptance=2"),
        ("simulator=openai", "simulator.openai.model="),
        ("simulator.openai.endpoints=api.example.com", "simulator.openai.endpoints=api.example.com"),
        ("simulator.openai.max_cost=5", "simulator.openai.max_cost=5"),
        ("simulator.openai.max_concurrent=0", "simulator.openai.max_concurrent=0"),
        ("simulator.engine.gpus_per_rank=0", "simulator.engine.gpus_per_rank=0"),
        ("simulator.llm.temperature=-1", "simulator.llm.temperature=-1"),
        ("simulator.judges=3", "simulator.judges=3"),
        ("rollout.max_reply_tokens=20000", "model.max_context_tokens="),
        ("algorithm.updates_per_iteration=64", "use at most 32"),
        ("rollout.dialogues_per_iteration=30", "a multiple of algorithm.group_size=4"),
        ("algorithm.gae_lambda=1.5", "algorithm.gae_lambda=1.5"),
        ("algorithm.kl_target=0.1", "algorithm.kl_target=0.1"),
        ("+exp=grpo_no_think algorithm.kl_coef=0.1 algorithm.kl_estimator=k1", "algorithm.kl_estimator=k1"),
        (
            "+exp=grpo_no_think simulator=openai simulator.openai.model=m simulator.openai.max_concurrent=1 "
            "simulator.replicas=2",
            "use 2 or more",
        ),
        ("+exp=ppo_think critic.zero_stage=0 critic.offload_optimizer=false", "critic.zero_stage=0"),
        ("critic.epochs=0", "critic.epochs=0"),
        ("+exp=ppo_think critic.pretrain_iterations=1000", "critic.pretrain_iterations=1000"),
        ("+exp=ppo_think warm_up.dialogues=4", "warm_up.batch_size=16"),
        ("learner.zero_stage=7", "learner.zero_stage=7"),
        ("warm_up.lr=0", "warm_up.lr=0"),
        ("model.lora.rank=-1", "model.lora.rank=-1"),
        ("+exp=grpo_think learner.zero_stage=0 learner.offload_optimizer=false", "model.dtype=float32"),
        ("cluster.engines=2", "cluster.learner_ranks=0"),
        ("num_iterations=0", "num_iterations=0"),
    ],
)
def test_a_bad_value_is_named_with_the_way_out(override, words):
    with pytest.raises(ConfigError) as caught:
        composed(*(override.split() if "+exp" in override else ["+exp=grpo_no_think", override]))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "use" in str(caught.value) or "set" in str(caught.value)


@pytest.mark.parametrize("overrides", [["+exp=grpo_think"], ["+exp=ppo_think", "critic.trunk=frozen"]])
def test_a_critic_that_trains_nothing_in_bfloat16_may_do_without_zero(overrides):
    assert (
        composed(*overrides, "critic.zero_stage=0", "critic.offload_optimizer=false").critic.zero_stage == 0
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_derived_placement_spreads_and_offloads_the_learners(recipe):
    config = composed(f"+exp={recipe}")
    for learner in (config.learner, config.critic):
        assert (learner.zero_stage, learner.offload_optimizer, learner.gradient_checkpointing) == (
            3,
            True,
            True,
        )
    config = composed(f"+exp={recipe}", "+on=cpu")
    for learner in (config.learner, config.critic):
        assert (learner.zero_stage, learner.offload_optimizer, learner.gradient_checkpointing) == (
            1,
            False,
            False,
        )


def test_a_misspelt_key_is_refused():
    with pytest.raises(ConfigError, match=r"^algorithm\.group_sise: there is no such option; see README\.md"):
        composed("+algorithm.group_sise=4")


def test_defaults_are_valid():
    assert AlgorithmConfig().group_size == 4


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rlver_dist.launch", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_check_prints_the_arithmetic_and_writes_nothing(tmp_path):
    done = launch("+exp=grpo_no_think", "+on=node8", "check=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32 personas x 4 dialogues = 128 dialogues, up to 1024 turns" in done.stdout
    assert "needs 8 GPUs: policy engines 1 + users 2 + learners 5" in done.stdout
    assert "spoken for by Qwen/Qwen2.5-14B-Instruct (vllm), up to 2048 calls an iteration" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [("ppo_think", "8 an iteration, 7760 in all"), ("grpo_think", "8 an iteration, 8000 in all")],
)
def test_check_counts_no_steps_of_the_policy_while_the_critic_learns_alone(recipe, steps):
    config = composed(f"+exp={recipe}", "critic.pretrain_iterations=30")
    assert f"optimizer steps       {steps}" in describe(config, [], [])


def test_check_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; sys.argv = ['launch', '+exp=grpo_no_think', '+on=cpu', 'check=true'];"
        "from rlver_dist.launch import main; main();"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'wandb'} & set(sys.modules); assert "
        "not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_refused_value_exits_with_one_line(tmp_path):
    done = launch("+exp=grpo_no_think", "+on=cpu", "learner.lr=0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: learner.lr=0.0: use a number above 0"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "learner.lr=fast",
            "learner.lr: Value 'fast' of type 'str' could not be converted to Float; see README.md",
        ),
        (
            "algorithm.name=sac",
            "algorithm.name: Invalid value 'sac', expected one of [grpo, ppo]; see README.md",
        ),
        ("learner.lrr=1", "learner.lrr: Key 'lrr' not in 'LearnerConfig'; see README.md"),
        ("output_dir=${nowhere}", "output_dir: Interpolation key 'nowhere' not found; see README.md"),
        (
            "+model=huge",
            "In 'config': Could not find 'model/huge' Available options in 'model': qwen2_5_7b_instruct ",
        ),
        ("learner.lr", "Error parsing override 'learner.lr' missing EQUAL at '<EOF>' "),
    ],
)
def test_what_cannot_be_composed_exits_with_one_line(override, words, tmp_path):
    done = launch("+on=cpu", override, "check=true", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


def test_a_warning_given_while_the_run_goes_on_is_seen(tmp_path):
    warn = "logging.getLogger('rlver_dist.tracking.wandb').warning('W&B log failed')"
    source = (
        f"import logging; from rlver_dist import launch; launch.run = lambda config: {warn}; launch.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, "+on=cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == "W&B log failed\n"


BARE_PERSONA = {
    "id": "p1",
    "name": "A",
    "profile": "x",
    "scene": "y",
    "temperament": "passive",
    "hidden_intent": "praise",
    "want": "z",
}
"""Without what rules need to speak for it: opening and facts."""


def test_personas_that_the_users_cannot_speak_for_are_refused_at_once(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(BARE_PERSONA) + "\n")
    done = launch("+exp=grpo_no_think", "+on=cpu", "data.train=mine.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: persona p1: opening is empty") and "data.train=bank" in done.stderr


def test_a_model_that_is_not_there_is_named(tmp_path):
    done = launch("+exp=grpo_no_think", "+on=cpu", "model.path=./nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "error: model.path=./nowhere: no config.json in that folder; name a Hugging Face model folder"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["simulator=openai", "simulator.openai.model=m"],
            "simulator.openai.api_key_env=OPENAI_API_KEY: not set in the environment",
        ),
        (
            ["simulator=vllm", "simulator.engine.model=./nowhere"],
            "simulator.engine.model=./nowhere: no config.json in that folder",
        ),
        (
            ["simulator=vllm", "simulator.engine.kv_cache_gib=100000"],
            "simulator.engine.model=smollm2-135m-instruct: weights, optimizers",
        ),
    ],
)
def test_what_the_users_cannot_do_without_is_missed_before_anything_starts(tmp_path, overrides, words):
    done = launch("+exp=grpo_no_think", "+on=cpu", *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_chat_models_speak_for_personas_that_rules_cannot(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({**BARE_PERSONA, "language": "zh"}) + "\n")
    arguments = ["+exp=grpo_no_think", "+on=cpu", "data.train=mine.jsonl", "simulator=vllm", "check=true"]
    assert launch(*arguments, cwd=tmp_path).returncode == 0
    (tmp_path / "mine.jsonl").write_text(json.dumps({**BARE_PERSONA, "language": "fr"}) + "\n")
    done = launch(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and "persona p1: language=fr: use personas in en or zh" in done.stderr
