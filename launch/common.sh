# shellcheck shell=bash
# Functions of the scripts beside this file, which source it.

dry_run=false

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# usage SCRIPT: the comment at the head of a script.
usage() {
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
    exit 0
}

# need COMMAND ADVICE: fails with the advice unless the command exists; a dry run only prints a note.
need() {
    if ! command -v "$1" >/dev/null; then
        "$dry_run" || fail "no command '$1' on the PATH: $2"
        printf '%s: note: no command %s on the PATH: %s\n' "${0##*/}" "$1" "$2" >&2
        return 1
    fi
}

# need_package EXTRA: fails unless simcse-jax is installed.
need_package() {
    need simcse-jax "activate its environment (source .venv/bin/activate), or install it (pip install '.[$1]')" || true
}

# run COMMAND ...: runs it, or prints it, quoted for a shell.
run() {
    if "$dry_run"; then
        printf '%q' "$1"
        printf ' %q' "${@:2}"
        printf '\n'
    else
        "$@"
    fi
}

# output_of ARGUMENT ...: the run folder among the arguments of `simcse-jax train`.
output_of() {
    local output=runs/default
    while [ $# -gt 0 ]; do
        case $1 in
            --output) output=${2:-} ;;
            --output=*) output=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$output"
}
