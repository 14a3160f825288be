#!/usr/bin/env bash
# Install what the tests need and pass them. Further arguments go to pytest.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
. scripts/install.sh "quickstart,test,dev"
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
exec python -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal "$@"
