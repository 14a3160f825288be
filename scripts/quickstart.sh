#!/usr/bin/env bash
# The main job on an embedded default, from nothing to a tuned, merged, reopened model.
#   bash scripts/quickstart.sh          SmolLM2-135M as a GLM, LoRA under ZeRO-2: about eight minutes on 2 CPU cores
#   bash scripts/quickstart.sh --tiny   the same with a small random model: about a minute
# Both after the installation. GPUs are used when there are any. It writes to runs/, to the environment
# ($VENV, by default .venv) and to the cache of examples ($FINETUNE_CACHE, by default ~/.cache/glm4-finetune).
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
case "${1:-}" in
    "") model=runs/quickstart-model run=runs/quickstart; options=() ;;
    --tiny) model=runs/tiny-model run=runs/quickstart-tiny
            options=("model.path=$model" "training.output_dir=$run" data.max_length=1024 training.max_steps=12 training.num_epochs=null evaluation.max_samples=12 evaluation.max_new_tokens=16) ;;
    *) echo "usage: bash scripts/quickstart.sh [--tiny]" >&2; exit 2 ;;
esac
. scripts/install.sh quickstart

echo "A model is made, tuned, merged and opened again; what each phase took is said at the end."
phases=() begun=$SECONDS
took() { if [ -n "${phase:-}" ]; then phases+=("$(printf '%5d s  %s' $((SECONDS - since)) "$phase")"); fi; }
say() { took; phase="$*" since=$SECONDS; printf '\n== %s\n' "$*"; }
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus > 0 ? gpus : 2))
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
export TOKENIZERS_PARALLELISM=false

say "1/4 The model: $model"
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu    # DeepSpeed then does not look for another one, nor says so
TQDM_DISABLE=1 python scripts/fixtures/quickstart_model.py "$model" ${1:-}
rm -rf "$run" "$run-merged" "$run-report"    # this script's own output, made anew

say "2/4 Train LoRA under ZeRO-2 in $processes processes, scored before and after"
torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node="$processes" finetune.py configs/quickstart.yaml ${options[@]+"${options[@]}"}

say "3/4 Merge the adapter into a plain checkpoint: $run-merged"
python finetune.py merge "$run" --output "$run-merged"

say "4/4 Reopen it with plain transformers: replies of the base and of the tuned model"
TQDM_DISABLE=1 python scripts/evidence/quickstart_replies.py "$model" "$run-merged"

say "What it learned"
python finetune.py status "$run"
python finetune.py compare "$run" --output "$run-report" >/dev/null
echo
echo "report: $PWD/$run-report/report.html"

took
printf '\n== %d min %02d s, without the installation\n' $(((SECONDS - begun) / 60)) $(((SECONDS - begun) % 60))
printf '%s\n' "${phases[@]}"

printf '\n== Done. Next:\n'
cat <<END
  $VENV/bin/finetune chat $run-merged                                        talk to it
  $VENV/bin/finetune evaluate $run --include-base --output $run-evaluation   all checkpoints with intervals: report.html
  $VENV/bin/finetune data check YOUR.jsonl --model $model                    your own data, before you train on it
END
