#!/bin/sh
# Prints the path of a Python >= 3.12, < 3.15 that can make virtual environments; exits 1 with advice if there is none.
# Called by the Makefile; a first argument, when not empty, is tried before everything else.
#
# Each candidate is run, not only looked up: a pyenv shim named python3.12 exists even where that version is not selected.

preferred=$1
incomplete=

# Prints the interpreter's own path, so that neither a shim nor an active virtual environment is recorded in the new one.
probe='
import sys
if not (3, 12) <= sys.version_info[:2] < (3, 15):
    sys.exit(1)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(2)
print(getattr(sys, "_base_executable", None) or sys.executable)
'

# try CANDIDATE: on success prints the path and ends the script.
try() {
    found=$("$1" -I -c "$probe" 2>/dev/null)
    case $? in
        0) printf '%s\n' "$found"; exit 0 ;;
        2) incomplete=$1 ;;
    esac
}

if [ -n "$preferred" ]; then
    try "$preferred"
    printf 'PYTHON=%s is not a usable Python 3.12, 3.13 or 3.14; looking for another.\n' "$preferred" >&2
fi

for name in python3.12 python3.13 python3.14 python3 python; do
    try "$name"
done

# Versions that pyenv has installed but not selected.
pyenv_root=$(pyenv root 2>/dev/null) || pyenv_root=${PYENV_ROOT:-${HOME:-}/.pyenv}
for version in 3.12 3.13 3.14; do
    for path in "$pyenv_root"/versions/"$version"*/bin/python; do
        try "$path"
    done
done

if [ -n "$incomplete" ]; then
    printf '%s\n' "error: $incomplete has the right version but lacks the venv module." \
        "Install it (Debian, Ubuntu: the package python3-venv or python3.12-venv) and run make again." >&2
else
    printf '%s\n' "error: no Python 3.12, 3.13 or 3.14 was found." \
        "Install one (for example 'pyenv install 3.12', or your system's python3.12 and python3.12-venv packages)," \
        "or name one: make PYTHON=/path/to/python3.12 ..." >&2
fi
exit 1
