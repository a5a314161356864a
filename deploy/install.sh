#!/bin/sh
# Install synth into the environment of PYTHON (default: python3). Its torch, transformers and other packages, such as those of
# vLLM, keep their versions.
#
#   sh deploy/install.sh FOLDER-OR-WHEEL [EXTRAS]     EXTRAS: embedded,train,heic by default
set -eu
source=${1:?"pass the folder of synth, or a wheel"}
extras=${2:-embedded,train,heic}
python=${PYTHON:-python3}

if "$python" -m pip --version > /dev/null 2>&1; then
    pip() { command "$python" -m pip "$@"; }
else
    pip() { command uv pip "$@" --python "$(command -v "$python")"; }
fi
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# Only packages of an index: a package from a folder cannot be pinned by its version.
pip freeze | grep -E '^(torch|torchvision|transformers|tokenizers|numpy|pillow|pydantic|llguidance|vllm)==' > "$constraints" || true
pip install --no-cache-dir --constraint "$constraints" "${source}[${extras}]"
"$python" -m pipeline --version
"$python" -m pipeline doctor
