#!/bin/sh
# Install synth into the environment of PYTHON (default: python3), which may have vLLM: its torch, transformers and other
# packages keep their versions.
#
#   sh deploy/install.sh FOLDER-OR-WHEEL [EXTRAS]     EXTRAS: embedded,train,heic by default
set -eu
source=${1:?"say what to install: the folder of synth, or a wheel"}
extras=${2:-embedded,train,heic}
python=${PYTHON:-python3}

if "$python" -m pip --version > /dev/null 2>&1; then
    pip() { command "$python" -m pip "$@"; }
else
    pip() { command uv pip "$@" --python "$(command -v "$python")"; }
fi
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# Only what comes from an index: a package in a folder has no version that could be asked for again.
pip freeze | grep -E '^(torch|torchvision|transformers|tokenizers|numpy|pillow|pydantic|llguidance|vllm)==' > "$constraints" || true
pip install --no-cache-dir --constraint "$constraints" "${source}[${extras}]"
"$python" -m pipeline --version
"$python" -m pipeline doctor
