#!/usr/bin/env bash
# What one GPU must answer, stage by stage, each in a process of its own with a time limit of its own;
# every figure is a JSON line in the answers' file the moment it exists, predicted beside measured.
#
#   scripts/bench/gpu.sh [--rehearse] [--model FOLDER] [--answers FILE] [--wheels FOLDER] [STAGE ...]
#
# FOLDER needs no more than GLM-4-9B's config.json: weights are drawn on the device. --rehearse runs the
# same stages at tiny size on a CPU. A machine that is lent for minutes takes two calls, 300 s each at most:
# `gpu.sh ... ceilings kernels correct attention train`, then `gpu.sh ... qlora step`, `gpu.sh ... generate`.
# --wheels names a folder with what the machine lacks; nothing is fetched.
set -u
python=${PYTHON:-python}
here=$(cd "$(dirname "$0")/../.." && pwd)
rehearse="" model="" answers="gpu.jsonl" wheels="" stages=""
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=--rehearse ;;
    --model) model=$2; shift ;;
    --answers) answers=$2; shift ;;
    --wheels) wheels=$2; shift ;;
    -h|--help) sed -n '2,10p' "$0" | cut -c3-; exit 0 ;;
    -*) echo "$1: unknown option; see --help" >&2; exit 2 ;;
    *) stages="$stages $1" ;;
  esac
  shift
done
if [ -z "$rehearse" ] && [ -z "$model" ]; then echo "give --model FOLDER, or --rehearse" >&2; exit 2; fi
# Seconds that a stage may take; ten minutes in all.
limit() {
  case $1 in
    ceilings) echo 40 ;; kernels) echo 60 ;; correct) echo 60 ;; attention) echo 40 ;;
    qlora) echo 60 ;; step) echo 200 ;; generate) echo 60 ;; train) echo 80 ;; *) echo 60 ;;
  esac
}
[ -n "$wheels" ] && "$python" -m pip install --quiet --no-index --find-links "$wheels" -r "$wheels/requirements.txt"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
failed=0
for stage in ${stages:-ceilings kernels correct attention qlora step generate train}; do
  timeout "$(limit "$stage")" "$python" "$here/scripts/bench/gpu.py" "$stage" \
    --answers "$answers" ${model:+--model "$model"} $rehearse
  code=$?
  if [ $code -ne 0 ]; then
    failed=1
    echo "{\"stage\": \"$stage\", \"failed\": $code}" >> "$answers"
    echo "$stage: ended with $code (124: its time was up)" >&2
  fi
done
"$python" "$here/scripts/bench/gpu.py" table --answers "$answers"
exit $failed
