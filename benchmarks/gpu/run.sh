#!/usr/bin/env bash
# Runs the parts of benchmarks/gpu from their pack, on a machine that needs no network:
#
#     benchmarks/gpu/run.sh --minutes 9           # most important first; --help lists the options
#     benchmarks/gpu/run.sh --quick               # a rehearsal, also without a GPU
#
# The pack is the one beside this script, or that in .gpu/ of the checkout, which a clone makes anew. PYTHON names the
# interpreter (default: that of .venv, or python3). Results go to runs/gpu; where OUT names a folder, there as well, as
# one file.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pack=$here/pack.tar.gz
python=${PYTHON:-python3}
if [ ! -f "$pack" ]; then
    root=$(cd "$here/../.." && pwd)
    pack=$root/.gpu/pack.tar.gz
    if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
        python=$root/.venv/bin/python
    fi
    if [ -e "$root/.git" ]; then
        (cd "$root" && "$python" -m benchmarks.gpu.prepare)
    elif [ ! -f "$pack" ]; then
        echo "no $pack: make it in a clone, with python -m benchmarks.gpu.prepare, and copy .gpu/ to here" >&2
        exit 1
    fi
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -xzf "$pack" -C "$work"
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
if [ -d "$work/data" ]; then
    export SIMCSE_DATA=$work/data
fi
"$python" -P -m benchmarks.gpu "$@"
