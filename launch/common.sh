# shellcheck shell=bash
# Functions of the scripts beside this file, which source it.

dry_run=false yes=false
# The options of `simcse-jax train` whose names have no dot; each may be --no-NAME, too.
train_options=' --output --seed --batch-size --micro-batch --epochs --max-steps --log-every --tracking --profile '
train_options+='--multi-host --heartbeat --join-timeout --compilation-cache --gpu-memory --gpu-preallocate '
train_options+='--xla-preset --stopped-status --no-verify --debug --quiet --verbose '

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# usage SCRIPT: the comment at the head of a script.
usage() {
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
    exit 0
}

# take COUNT FLAGS VALUED ARGUMENT ...: finds the script's own options, wherever they stand, and calls its function
# `option NAME [VALUE]` for each; FLAGS and VALUED name them. The array `rest` gets the other arguments: COUNT words, of
# which the last is the config, and options of simcse-jax train after them; whatever follows `--` is among these.
take() {
    # Names that `option` does not set, because bash would set these.
    local words_before=$1 known_flags=" $2 " known_valued=" $3 " given
    shift 3
    rest=()
    while [ $# -gt 0 ]; do
        given=${1%%=*}
        if [ "$1" = -- ]; then
            rest+=("${@:2}")
            return
        elif [[ $1 == --help || $1 == -h ]]; then
            usage "$0"
        elif [ "$1" = --dry-run ]; then
            dry_run=true
        elif [[ $1 == --* && $known_flags == *" $1 "* ]]; then
            option "$1"
        elif [[ $1 == --* && $known_valued == *" $given "* ]]; then
            if [ "$1" = "$given" ]; then
                [[ $# -gt 1 && $2 != --* ]] || fail "$1 needs a value"
                option "$1" "$2"
                shift
            else
                option "$given" "${1#*=}"
            fi
        elif [[ $1 == -* && ${#rest[@]} -lt $words_before ]]; then
            stray "$1"
        else
            [[ $1 != --* ]] || check_train_option "$given"
            rest+=("$1")
        fi
        shift
    done
}

# check_train_option OPTION: fails if simcse-jax train has no such option; here, before a machine is paid for.
check_train_option() {
    local name=${1//_/-}
    [[ $name == *.* || $train_options == *" $name "* || $train_options == *" --${name#--no-} "* ]] ||
        fail "neither this script nor simcse-jax train has an option $1; see --help"
}

# check_config ARGUMENT ...: fails unless the arguments of `simcse-jax train` are a config and options; as above.
check_config() {
    [ $# -gt 0 ] || fail "give a config, e.g. sup_bert_base; see --help"
    [[ $# -eq 1 || $2 == -* ]] || fail "after the config come options of simcse-jax train, which begin with --; got '$2'"
}

# stray OPTION: what `take` does with an unknown option before the config.
stray() {
    fail "no option $1 here: options of simcse-jax train come after the config"
}

# confirm SENTENCE: asks before what the sentence says, which costs money or destroys data. --yes answers beforehand.
confirm() {
    if "$yes" || "$dry_run"; then return; fi
    [ -t 0 ] || fail "$1: give --yes to do it, or --dry-run to see the commands"
    local answer
    read -r -p "$1. Do it? [y/N] " answer
    [[ $answer == [yY]* ]] || fail "nothing was done"
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

# check_slices N: fails unless N is a number of TPU slices.
check_slices() {
    [[ $1 =~ ^[1-9][0-9]{0,3}$ ]] || fail "--slices takes the number of slices; got '$1'"
}

# over_slices N ARGUMENT ...: sets `rest` to these arguments of `simcse-jax train`, for several slices with --mesh.dcn N.
over_slices() {
    local dcn
    rest=("${@:2}")
    [ "$1" -gt 1 ] || return 0
    dcn=$(value_of --mesh.dcn '' "${rest[@]}")
    [ -n "$dcn" ] || rest+=(--mesh.dcn "$1")
    [ "${dcn:-$1}" = "$1" ] || fail "--mesh.dcn is $dcn and --slices $1: leave --mesh.dcn out"
}

# value_of OPTION DEFAULT ARGUMENT ...: the option's value among the arguments of `simcse-jax train`.
value_of() {
    local name=$1 value=$2
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
            "$name") value=${2:-} ;;
            "$name="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$value"
}
