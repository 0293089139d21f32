#!/bin/sh
# Builds the environments of bench_train.py's peers below DIR, one each, for their pins exclude one another:
#
#     sh tests/bench/peers.sh DIR
#
# PYTHON       interpreter that makes them (python3)
# TORCH_INDEX  package index of torch (its CPU builds); empty: pip's own. An environment that has this torch keeps it.
set -eu
[ $# -eq 1 ] || { echo "usage: sh tests/bench/peers.sh DIR" >&2; exit 2; }
torch=2.13.0
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

# environment NAME PACKAGE… : DIR/NAME with torch and the packages
environment() {
    home=$dir/$1
    shift
    [ -x "$home/bin/python" ] || "${PYTHON:-python3}" -m venv "$home"
    "$home/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$torch'" 2>/dev/null ||
        "$home/bin/python" -m pip install -q ${index:+--index-url "$index"} "torch==$torch"
    "$home/bin/python" -m pip install -q "torch==$torch" "$@"
}

mkdir -p "$1"
dir=$(cd "$1" && pwd)
environment sae-lens sae-lens==6.54.12
environment eai-sparsify eai-sparsify==1.3.3
environment dictionary-learning dictionary-learning==0.1.0 "transformers<5"
# It comes with a torchvision of another build than torch's, which breaks the import of transformers; nothing needs it.
"$dir/dictionary-learning/bin/python" -m pip uninstall -q -y torchvision

"$dir/sae-lens/bin/python" -c "import sae_lens"
"$dir/eai-sparsify/bin/python" -c "import sparsify" >&2
"$dir/dictionary-learning/bin/python" -c "import dictionary_learning.trainers"
echo "$dir"
