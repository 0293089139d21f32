#!/usr/bin/env bash
# cache → train a ladder of widths and a second seed → threshold → eval → stitch → meta → autointerp → report.
# Called by quickstart.sh and findings.sh, which choose the settings:
#
#   RUN           folder of the results
#   ACTS          the activation cache (default: $RUN/acts), made with CACHE_TOKENS tokens of the embedded corpus
#   WIDTHS        the ladder, smallest first: 288,576,1152
#   TRAIN         options of saetool train: architecture, sparsity, length
#   CE_TOKENS     tokens for the cross-entropies      META_STEPS   steps of the meta-SAE
#   THETA         cut-offs of the stitching: the paper's for L1 SAEs, and one near the best for small BatchTopK SAEs
#   LATENTS       latents to explain, of each SAE of the ladder
set -euo pipefail
mkdir -p "$RUN"
ACTS=${ACTS:-$RUN/acts}
THETA=${THETA:-0.7 0.4}
small=${WIDTHS%%,*}
large=${WIDTHS##*,}
name() { case "$TRAIN" in *topk*) echo "raw-$1.st" ;; *) echo "sae-$1.st" ;; esac; }

# 2% of this model's rows, nearly all " the", are attention sinks of several times the usual norm: without --max-norm
# they hold 40% of the variance, and what a stitching does to them hides what it does to all the others.
saetool cache --tokens "$CACHE_TOKENS" --max-norm 3 -o "$ACTS"

# shellcheck disable=SC2086
{
  saetool train "$ACTS" $TRAIN --latents "$WIDTHS" -o "$RUN/$(name '{latents}')" --log "$RUN/train.jsonl"
  saetool train "$ACTS" $TRAIN --latents "$small" --seed 1 -o "$RUN/$(name "$small-seed1")" --log "$RUN/train.jsonl"
}

# A TopK-type SAE selects among a whole batch: single tokens need a threshold (eq. 8). L1 SAEs encode as they are.
ladder=()
for width in ${WIDTHS//,/ }; do
  ladder+=("$RUN/sae-$width.st")
done
seed1="$RUN/sae-$small-seed1.st"
case "$TRAIN" in
  *topk*)
    for sae in "${ladder[@]}" "$seed1"; do
      raw=$(basename "$sae")
      saetool threshold "$RUN/raw-${raw#sae-}" "$ACTS" -o "$sae"
    done
    ;;
esac

saetool eval "${ladder[@]}" "$seed1" --acts "$ACTS" --ce --ce-tokens "${CE_TOKENS:-8192}" -o "$RUN/eval.json"
for theta in $THETA; do
  saetool stitch "${ladder[@]}" --acts "$ACTS" --theta "$theta" -o "$RUN/stitch-$theta.json"
done
saetool stitch "${ladder[0]}" "${ladder[-1]}" -o "$RUN/far.json"
saetool stitch "${ladder[0]}" "$seed1" --acts "$ACTS" -o "$RUN/seeds.json"
saetool meta "$RUN/sae-$large.st" --steps "${META_STEPS:-1000}" --compare "${ladder[@]:0:${#ladder[@]}-1}" -o "$RUN/meta.st"
for width in ${WIDTHS//,/ }; do
  saetool autointerp "$RUN/sae-$width.st" --acts "$ACTS" --latents "${LATENTS:-all}" -o "$RUN/latents-$width.jsonl"
done
saetool autointerp "$RUN/meta.st" --parent "$RUN/sae-$large.st" --labels "$RUN/latents-$large.jsonl" -o "$RUN/meta-latents.jsonl"
saetool report "$RUN" -o "$RUN/report.html"
