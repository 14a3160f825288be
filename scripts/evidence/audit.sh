#!/usr/bin/env bash
# Compare the pinned versions with the public databases of known holes (needs the network).
# An exception is `ID  until  why`; after its date the audit fails again.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/../.."
EXCEPTIONS='
'
today="$(date +%F)"
ignored=()
while read -r id until why; do
    [ -n "$id" ] || continue
    if [[ "$until" < "$today" ]]; then
        echo "the exception for $id ($why) ended on $until: look at it again" >&2
        exit 1
    fi
    ignored+=(--ignore-vuln "$id")
done <<<"$EXCEPTIONS"
VENV="${AUDIT_VENV:-$(mktemp -d)/venv}"
[ -x "$VENV/bin/pip-audit" ] || { python3 -m venv "$VENV" && "$VENV/bin/pip" install -q pip-audit; }
exec "$VENV/bin/pip-audit" --strict --no-deps --disable-pip -r constraints.txt "${ignored[@]}" "$@"
