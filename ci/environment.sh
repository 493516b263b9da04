# Makes .venv with the exact versions that are tested, unless it is there already. To be sourced.
# CONSTRAINTS: the file that names them (default: ci/constraints.txt).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
constraints=${CONSTRAINTS:-ci/constraints.txt}
wanted=$(cat pyproject.toml "$constraints" | sha256sum | cut -d' ' -f1)
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
# EXTRAS: what a script needs of pyproject's extras; what other scripts have installed stays.
held=$(sed -n "s/^$wanted //p" .venv/installed-from 2>/dev/null || true)
extras=$(echo "$held,${EXTRAS:-train,study,test}" | tr , '\n' | sed '/^$/d' | sort -u | paste -sd, -)
if [ "$held" != "$extras" ]; then
  echo "installing into .venv (a minute or two)"
  # PyTorch first and by its exact version: a build without CUDA is a tenth of the size.
  torch=$(grep '^torch==' "$constraints")
  .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
  .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[$extras]"
  echo "$wanted $extras" > .venv/installed-from
fi
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false
