#!/usr/bin/env bash
# Install what the tests need and pass them. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install.sh "quickstart,test,dev"
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
exec python -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal "$@"
