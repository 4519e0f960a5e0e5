# Sourced by the scripts beside it. Makes .venv in the root of the repository from the versions
# in constraints.txt, and reuses it as long as they and pyproject.toml stay the same. With NEWEST=1
# it is .venv-newest, of the newest versions that this Python gets; torch alone stays the tested
# one, whose newest build for processors is not everywhere to be had.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv${NEWEST:+-newest}"

# Print a Python that can make the environment: $PYTHON where it is set, else the first that fits.
find_python() {
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11 python)
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c \
            'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: none of ${candidates[*]} is Python 3.11 or later with venv; install one," \
        "or set PYTHON to its path" >&2
    return 1
}

# environment [docs|test|dev]: .venv with the package, editable, and the dependencies of that extra.
environment() {
    local extra="${1:-}" contained=base python wanted
    case "$extra" in
        docs) contained="base docs" ;;
        test) contained="base test" ;;
        dev) contained="base docs test dev" ;;
    esac
    wanted="$root $(cat "$root/constraints.txt" "$root/pyproject.toml" | cksum)"
    if [[ "$(cat "$venv/.installed-${extra:-base}" 2>/dev/null)" == "$wanted" ]]; then return; fi

    echo "Installing into $venv (once; some minutes) ..." >&2
    # Without a stamp of this folder the environment was interrupted, or moved here: start again.
    if ! cat "$venv"/.installed-* 2>/dev/null | grep -qF "$root "; then
        python="$(find_python)"
        "$python" -m venv --clear "$venv"
    fi
    rm -f "$venv"/.installed-*
    # Torch goes first and alone, so that a CPU build is kept where the machine offers one.
    (
        cd "$root"
        pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
        "${pip[@]}" -c constraints.txt torch
        if [[ -n "${NEWEST:-}" ]]; then
            "${pip[@]}" -e ".${extra:+[$extra]}"
        else
            "${pip[@]}" -c constraints.txt -e ".${extra:+[$extra]}"
        fi
    )
    # The stamps come last: an interrupted install has none and is done again.
    for extra in $contained; do echo "$wanted" >"$venv/.installed-$extra"; done
}
