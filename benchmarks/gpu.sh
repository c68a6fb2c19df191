#!/usr/bin/env bash
# All that needs a GPU, in steps that resume: benchmarks/gpu.sh OUT [STEP...] [--minutes 9] [--work DIR] [--tiny] [--list]
#   PYTHON=python3     an interpreter that has torch with CUDA
#   WHEELS=DIR         a folder of wheels to install, without a network, of what that interpreter lacks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PYTHON:=python3}"
if [ -n "${WHEELS:-}" ]; then
    installed=${TMPDIR:-/tmp}/edit-compile-wheels
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$installed" "$WHEELS"/*.whl
    export PYTHONPATH=$installed${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m benchmarks.gpu "$@"
