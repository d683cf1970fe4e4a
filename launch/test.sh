#!/usr/bin/env bash
# Sets up as local.sh does, then checks style, types and the pages of docs/, and runs the tests:
#   launch/test.sh                        all but those marked slow
#   launch/test.sh --slow                 those marked slow, and nothing else
#   launch/test.sh tests/unit -k kl       further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

if [ "${1:-}" = "--slow" ]; then
    exec .venv/bin/python -m pytest -m slow --durations=5 "${@:2}"
fi
.venv/bin/ruff check .
.venv/bin/mypy
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict # into site/, which git ignores
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
exec .venv/bin/python -m pytest --durations=25
