#!/usr/bin/env bash
# One build, tested under several versions of torch:
#
#   tests/matrix.sh PYTHON [torch versions, default: 2.10.0 2.13.0+cpu newest]
#
# PYTHON's environment makes the wheel. Each version gets an environment of its own, kept in
# .venv-matrix for the next call, into which that same wheel is installed.
set -euo pipefail

python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(2.10.0 2.13.0+cpu newest)

cd "$(dirname "$0")/.."
root=$PWD
# Tests of the operator and the module: nothing that builds the package, needs smp or a checkout. Those
# of the emulation compile csrc/ with the headers of that torch.
core=(tests/ops tests/layers tests/module tests/cpu tests/export/test_export.py
  tests/building/test_abi.py --ignore=tests/module/test_distributed.py --ignore=tests/ops/test_fallback.py)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" .
# Away from the checkout, so that the installed package is what gets imported.
cp -r tests pyproject.toml "$work"

failed=()
for version in "${versions[@]}"; do
  venv=$root/.venv-matrix/torch-$version
  requirement=torch
  [ "$version" = newest ] || requirement="torch==$version"
  options=()
  [[ $version != *+cpu ]] || options=(--extra-index-url https://download.pytorch.org/whl/cpu)
  [ -d "$venv" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade "${options[@]}" \
    "$requirement" numpy pytest hypothesis expecttest
  "$venv/bin/python" -m pip install --quiet --no-deps --force-reinstall "$work"/cbam_ext-*.whl
  echo "=== $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)')"
  (cd "$work" && "$venv/bin/python" -m pytest -q -m "not install and not tools and not runtimes" "${core[@]}") || failed+=("$version")
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed under torch: ${failed[*]}"
  exit 1
fi
echo "one build passed under torch: ${versions[*]}"
