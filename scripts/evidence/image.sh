#!/usr/bin/env bash
# Build deploy/Dockerfile for CPUs without Docker, by buildah, and try the image: its help, doctor, a dry run, a short training.
#   bash scripts/evidence/image.sh FOLDER                    on python:3.11-slim, for which a registry of images must be in reach
#   BASE=debian bash scripts/evidence/image.sh FOLDER        on a Debian with Python 3.11 that debootstrap makes
# Images lie in FOLDER. BUILD_OPTIONS are further options of `buildah build`, such as a volume with pip's configuration.
# Needs buildah (and debootstrap); as root inside a container it works without a daemon and without privileges.
set -euo pipefail
case "${1:---help}" in -*) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/../.."
folder=$(mkdir -p "$1" && cd "$1" && pwd)
base=${BASE:-docker.io/library/python:3.11-slim}
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
of() { buildah --root "$folder/images" --runroot "$folder/run" "$@"; }

if [ "$base" = debian ]; then
    base=localhost/python:3.11-debian
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates,git bookworm "$folder/base"
    ln -sf python3 "$folder/base/usr/bin/python"
    rm -f "$folder/base/usr/lib/python3.11/EXTERNALLY-MANAGED"    # as in python:3.11-slim: pip installs without a venv
    made=$(of from scratch)
    of add --quiet "$made" "$folder/base" /
    of config --env PATH=/usr/local/bin:/usr/bin:/bin "$made"
    of commit --quiet --rm "$made" "$base"
fi
# shellcheck disable=SC2086
time of build ${BUILD_OPTIONS:-} --network host --build-arg BASE="$base" --build-arg TORCH=torch==2.13.0 \
    -f deploy/Dockerfile -t glm4-finetune:cpu .

made=$(of from localhost/glm4-finetune:cpu)
trap 'of rm "$made" >/dev/null' EXIT
in_image() { printf '\n$ %s\n' "$*"; of run --user 1000:1000 "$made" -- "$@"; }
in_image finetune --help | tail -4
in_image finetune doctor | tail -8
of run --user 1000:1000 -v "$PWD/scripts:/app/scripts:ro" "$made" -- python scripts/fixtures/quickstart_model.py runs/first-model --tiny
in_image finetune train configs/lora.yaml model.path=runs/first-model --dry-run | tail -4
in_image finetune train configs/lora.yaml model.path=runs/first-model model.dtype=float32 data.max_length=1024 training.num_epochs=null \
    training.max_steps=2 evaluation.max_samples=2 evaluation.max_new_tokens=4 | tail -3
