#!/usr/bin/env bash
# Repair the inference threshold of a BatchTopK SAE that SAELens trained, and give it back to SAELens.
#
#   bash examples/repair_threshold.sh SAELENS_FOLDER ACTS [OUT [OPTIONS]]     (default OUT: SAELENS_FOLDER-repaired)
#
# OPTIONS are those of saetool threshold, such as --batch-size, which SAELens does not write down.
#
# SAELens keeps a running average of the batches' smallest activations, which starts at 0 and moves by 1% a step: after a
# short run the threshold is too low, and many more latents than k fire. Nothing has to be trained again: the threshold
# is estimated from cached activations of the same site (saetool cache), and is all that changes.
# Writes OUT.st (saetool's), OUT/ (SAELens': SAE.load_from_disk), and OUT.json with both SAEs' L0 on held-out tokens.
set -euo pipefail
theirs=${1:?give the folder of a SAELens BatchTopK SAE}
acts=${2:?give a cache of activations, made by saetool cache}
out=${3:-${theirs%/}-repaired}

saetool threshold "$theirs" "$acts" -o "$out.st" "${@:4}"
saetool convert "$out.st" --to saelens -o "$out"
saetool eval "$theirs" "$out" --acts "$acts" -o "$out.json"
