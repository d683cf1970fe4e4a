#!/usr/bin/env bash
# Sets up as local.sh does, then checks style and types and runs all tests. Arguments go to pytest:  launch/test.sh tests/unit -k kl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

.venv/bin/ruff check .
.venv/bin/mypy
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
exec .venv/bin/python -m pytest --durations=15
