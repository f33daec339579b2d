#!/usr/bin/env bash
# usage: bench/gpu_check.sh OUT_DIR [--fresh] [--dry-run]   Everything that only a GPU can tell, in
# under 9 minutes and offline; OUT_DIR/verdict.txt says what came. PYTHON names the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 2
exec "${PYTHON:-python3}" bench/gpu_check.py "$@"
