"""The entry point: compose, check, save the resolved configuration, build the cluster, run the driver.

    python -m rlver_dist.launch +exp=ppo_think +on=cpu
    python -m rlver_dist.launch +exp=ppo_think +on=node8 check=true

Heavy packages are imported only after the configuration has been checked.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlver_dist.config.enums import SimulatorBackend
from rlver_dist.config.precision import with_precision
from rlver_dist.config.run import RunConfig
from rlver_dist.data.personas import leak_notice, load_split
from rlver_dist.errors import ConfigError, exit_code
from rlver_dist.files import write_whole
from rlver_dist.preflight.dry_run import describe
from rlver_dist.preflight.requirements import check_requirements
from rlver_dist.simulator.suitability import check_languages, check_personas, check_second_judge

PACKAGE = Path(__file__).resolve().parent
CONFIG_DIR = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
OPTIONS = "see README.md, Configuration, for where every option and its values stand"


def order_overrides(arguments: list[str]) -> list[str]:
    """Put recipes (`+exp=`) before placements (`+on=`), whatever the order given: later groups win, and a
    placement scales a recipe."""

    def is_group(argument: str) -> bool:
        return argument.lstrip("+").startswith(("exp=", "on="))

    # Only these two change places, among themselves: a flag such as `--cfg job` keeps the word after it.
    groups = iter(
        sorted(filter(is_group, arguments), key=lambda argument: argument.lstrip("+").startswith("on="))
    )
    return [next(groups) if is_group(argument) else argument for argument in arguments]


def to_config(composed: DictConfig) -> RunConfig:
    """The single hand-over from Hydra to dataclasses; runs every check.

    Raises:
        ConfigError: a key or a value is refused.
    """
    _refuse_unknown(composed)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    assert isinstance(config, RunConfig)
    return config


def _refuse_unknown(group: DictConfig, prefix: str = "") -> None:
    """Refuse keys that no dataclass has: `+key=` slips past the schema while Hydra composes."""
    schema = OmegaConf.get_type(group)
    assert isinstance(schema, type) and dataclasses.is_dataclass(schema)
    known = {field.name for field in dataclasses.fields(schema)}
    for key in map(str, group):
        if key not in known:
            raise ConfigError(f"{prefix}{key}: there is no such option; {OPTIONS}")
        node = group._get_node(key)
        if isinstance(node, DictConfig):
            _refuse_unknown(node, f"{prefix}{key}.")


def _one_line(error: Exception) -> str:
    """What Hydra or omegaconf refuses, with the way out, as one line."""
    # Hydra's own text names the override; the omegaconf error behind it says what is wrong, then in further
    # lines where.
    refused = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(refused, OmegaConfBaseException) and refused.full_key:
        return f"{refused.full_key}: {str(refused).splitlines()[0]}; {OPTIONS}"
    return " ".join(str(error).partition("Config search path:")[0].split())


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def run(config: RunConfig) -> int:
    """Check everything cheap, then train. Returns the exit code."""
    config, notices = with_precision(config)
    for line in notices:
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)
    train = load_split(config.data.train, "train")
    evaluation = load_split(config.data.evaluation, "evaluation")
    if notice := leak_notice(train, evaluation):
        print(f"warning: {notice}", file=sys.stderr)
    # Rules speak from a persona's opening and facts; a chat model needs no more than a language it knows.
    check_spoken_for = (
        check_personas if config.simulator.backend is SimulatorBackend.embedded else check_languages
    )
    check_spoken_for([*train, *evaluation])
    check_second_judge(config.evaluation.second_judge, evaluation[: config.evaluation.num_personas])
    if config.evaluation.num_personas > len(evaluation):
        raise ConfigError(
            f"evaluation.num_personas={config.evaluation.num_personas}: "
            f"data.evaluation={config.data.evaluation} has {len(evaluation)}; "
            "use at most that many"
        )
    for line in check_requirements(config, train, fetch=not config.check):
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)
    if config.check:
        print(describe(config, train, evaluation))
        return 0
    # Only now: it imports Ray, torch and vLLM, which takes seconds that a refused run need not wait for.
    from rlver_dist.trainer.run import run_on_cluster

    # A run that the cluster refuses leaves no folder behind.
    written_to = Path(config.output_dir) / "config.yaml"
    return run_on_cluster(config, train, evaluation, on_accepted=lambda: save_config(config, written_to))


def _job(composed: DictConfig) -> None:
    # Errors end here: Hydra would print a line of its own before letting them through.
    if code := exit_code(lambda: run(to_config(composed))):
        sys.exit(code)


def _compose_and_run() -> int:
    """Let Hydra read the command line and call `_job`, which exits by itself where the run fails.

    Raises:
        ConfigError: the command line or a file under `conf/` cannot be composed.
    """
    # This command writes to the environment here and nowhere else. Hydra reads the variable when it fails:
    # its errors then come through, instead of being printed over several lines with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(_job)()
    except HydraException as error:
        raise ConfigError(_one_line(error)) from error
    return 0


def main() -> None:
    """Console script `rlver-dist`, the same as `python -m rlver_dist.launch`."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    sys.argv[1:] = order_overrides(sys.argv[1:])
    if code := exit_code(_compose_and_run):
        sys.exit(code)


if __name__ == "__main__":
    main()
