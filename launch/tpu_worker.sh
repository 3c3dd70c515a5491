#!/usr/bin/env bash
# Carries out the commands of tpu_pod.sh on a worker of a slice, in the folder of this file.
#
#     tpu_worker.sh install WHEEL     install the package into an environment of its own
#     tpu_worker.sh start CONFIG ...  run simcse-jax train with these arguments in the background, output in simcse.log
#     tpu_worker.sh report            print running, ended STATUS, not started, or not set up
#     tpu_worker.sh stop              ask the run to save and stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

running() {
    [ -f simcse.pid ] && kill -0 "$(cat simcse.pid)" 2>/dev/null
}

idle() {
    if running; then echo "already running: run tpu_pod.sh stop first" >&2 && exit 2; fi
}

case $1 in
    install)
        idle
        # The images' own Python is too old; uv brings one.
        python3 -m pip install --quiet --user uv
        uv=$(python3 -m site --user-base)/bin/uv
        "$uv" venv --quiet --clear --python 3.12 simcse-env
        "$uv" pip install --quiet --python simcse-env/bin/python "./$2[tpu,storage]"
        ;;
    start)
        [ -x simcse-env/bin/simcse-jax ] || { echo "not set up: run tpu_pod.sh setup first" >&2 && exit 2; }
        idle
        rm -f simcse.status simcse.pid
        # The shell around it outlives the signal that stops the run, and keeps its status.
        # shellcheck disable=SC2016
        nohup setsid bash -c 'trap : TERM; "$@"; echo $? > simcse.status' simcse \
            simcse-env/bin/simcse-jax train "${@:2}" --multi-host --stopped-status 75 >>simcse.log 2>&1 </dev/null &
        echo $! >simcse.pid
        ;;
    report)
        if running; then
            echo running
        elif [ -f simcse.status ]; then
            echo "ended $(cat simcse.status)"
        elif [ -x simcse-env/bin/simcse-jax ]; then
            echo "not started"
        else
            echo "not set up"
        fi
        ;;
    stop)
        running || { echo "not running" >&2 && exit 2; }
        kill -TERM -- "-$(cat simcse.pid)"
        ;;
esac
