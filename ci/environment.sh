# Makes .venv with the exact versions that are tested, unless it is there already. To be sourced.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=$(cat pyproject.toml ci/constraints.txt | sha256sum | cut -d' ' -f1)
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
# With EXTRAS there is less in .venv than a script without them needs, but not the other way round.
held=$(cat .venv/installed-from 2>/dev/null || true)
if [ "$held" != "$wanted" ] && [ "$held" != "$wanted ${EXTRAS:-}" ]; then
  echo "installing into .venv (a minute or two)"
  # PyTorch first and by its exact version: a build without CUDA is a tenth of the size.
  torch=$(grep '^torch==' ci/constraints.txt)
  .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
  .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint ci/constraints.txt --editable ".[${EXTRAS:-train,test}]"
  echo "$wanted${EXTRAS:+ $EXTRAS}" > .venv/installed-from
fi
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false
