#!/usr/bin/env bash
# The paper's findings, with their controls, at a size where they show: BatchTopK and L1 SAEs trained long enough that
# two seeds of the smallest width agree. About half an hour on two cores; an interrupted run goes on.
#
#   bash examples/findings.sh [FOLDER]     (default folder: findings)
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/install.sh ""

folder=${1:-findings}
export ACTS="$folder/acts"
export CACHE_TOKENS=${CACHE_TOKENS:-1M}
export WIDTHS=${WIDTHS:-288,576,1152}
export CE_TOKENS=16384 META_STEPS=2000

RUN="$folder/batchtopk" TRAIN="--arch batchtopk --k 12 --tokens ${TOKENS:-8M} --lr 2e-3" bash examples/workflow.sh
RUN="$folder/l1" TRAIN="--arch relu --l1 2.5 --tokens ${TOKENS:-8M} --lr 1e-3" bash examples/workflow.sh
saetool report "$folder" -o "$folder/report.html" --title "Findings"
