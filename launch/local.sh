#!/usr/bin/env bash
# Trains on this machine's CPU with real parts. Arguments are Hydra overrides, appended to the defaults; a default +exp or +on is
# dropped where one is given:  launch/local.sh num_iterations=5   launch/local.sh +on=tiny check=true
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

exp=(+exp=ppo_think)
on=(+on=cpu)
for argument in "$@"; do
    case "$argument" in
        +exp=* | ++exp=* | exp=*) exp=() ;;
        +on=* | ++on=* | on=*) on=() ;;
    esac
done
exec .venv/bin/python -m rlver_dist.launch "${exp[@]}" "${on[@]}" "$@"
