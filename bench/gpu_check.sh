#!/usr/bin/env bash
# Everything that needs a GPU, in one call: bench/gpu_check.sh --help. PYTHON names the interpreter
# to use, one with torch. Folders on the command line are seen from where it is called.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.gpu_check --from "$called_from" "$@"
