#!/usr/bin/env bash
# The paper's whole workflow on a real language model and real text, on a laptop: about ten minutes on two cores.
#
#   bash examples/quickstart.sh [FOLDER]     (default folder: quickstart)
#
# Every step skips what is there already, so running it again takes seconds, and an interrupted run goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/install.sh ""

export RUN=${1:-quickstart}
export CACHE_TOKENS=${CACHE_TOKENS:-500k}
export WIDTHS=${WIDTHS:-288,576,1152}
export TRAIN="--arch batchtopk --k ${K:-12} --tokens ${TOKENS:-4M} --lr ${LR:-2e-3}"
bash examples/workflow.sh
