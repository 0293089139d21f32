#!/usr/bin/env bash
# Installs what the tests need into .venv (made if absent) and runs everything: format, lint, tests.
# Arguments go to pytest: bash tests/run.sh tests/core -k stitch
set -euo pipefail
cd "$(dirname "$0")/.."

source examples/install.sh test

if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing chromium for the page's tests" >&2
  (apt-get update -qq && apt-get install -y -qq chromium) >/dev/null 2>&1 \
    || echo "chromium could not be installed: the browser tests will be skipped" >&2
fi

ruff format --check .
ruff check .
# One thread: tiny tensors are faster so, and results do not depend on the machine's cores.
OMP_NUM_THREADS=1 python -m pytest "$@"
