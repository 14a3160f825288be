#!/usr/bin/env bash
# llama.cpp and our own generation, token by token, f16 and Q8_0, through llama.cpp's own converter. See docs/serving.md.
#   bash scripts/evidence/gguf_check.sh THUDM/glm-4-9b-chat         the tokenizer and settings of a published folder or hub id
# Builds llama-cpp-python (about five minutes, needs cmake and a C++ compiler); its sources bring the converter.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/../.."
[ $# = 1 ] || { echo "usage: bash scripts/evidence/gguf_check.sh FOLDER_OR_HUB_ID" >&2; exit 2; }
VERSION=0.3.36
SOURCES="${LLAMA_SOURCES:-$HOME/.cache/glm4-finetune/llama}"
. scripts/install.sh "quickstart,test"
python -c 'import llama_cpp' 2> /dev/null || python -m pip install --quiet "llama-cpp-python==$VERSION"
if [ ! -d "$SOURCES/llama_cpp_python-$VERSION" ]; then
    python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$SOURCES" "llama-cpp-python==$VERSION"
    tar -xzf "$SOURCES/llama_cpp_python-$VERSION.tar.gz" -C "$SOURCES"
fi
exec python scripts/evidence/gguf_check.py --llama-cpp "$SOURCES/llama_cpp_python-$VERSION/vendor/llama.cpp" --tokenizer "$1"
