#!/usr/bin/env bash
# A run on a Cloud TPU slice, or on several, from their creation to their deletion; together they are a queued resource.
#
#     launch/tpu_pod.sh [options] create                     ask for the slice and wait until it is there
#     launch/tpu_pod.sh [options] setup                      install this checkout on every worker, copy --file there
#     launch/tpu_pod.sh [options] start CONFIG [options of simcse-jax train]
#     launch/tpu_pod.sh [options] logs [WORKER [SLICE]]      follow the log of a worker, by default worker 0 of slice 0
#     launch/tpu_pod.sh [options] status                     state of the slice, and of the run on every worker
#     launch/tpu_pod.sh [options] stop                       save and stop
#     launch/tpu_pod.sh [options] resume CONFIG [options]    start a preempted or stopped run again, on a new slice if
#                                                            need be; does nothing while it runs or once it is done
#     launch/tpu_pod.sh [options] delete                     delete the slice and all on its disks
#
# Options: --name NAME       name of the slice; or TPU_NAME in the environment
#          --type TYPE       accelerator type, e.g. v5litepod-16; or TPU_TYPE
#          --slices N        slices NAME-0, NAME-1, ... of that type, which train as one: `train` gets --mesh.dcn N; or
#                            TPU_SLICES. By default one slice, NAME
#          --project ID      by default CLOUDSDK_CORE_PROJECT, or gcloud's own setting
#          --zone ZONE       by default CLOUDSDK_COMPUTE_ZONE, or gcloud's own setting
#          --runtime VERSION image of the workers; by default that of the type
#          --spot            ask for a spot slice: cheaper, and may be preempted
#          --file FILE       copy the file to the home folder of every worker, where the run starts; may be repeated
#          --shared          --output is a folder that all workers mount; without it, a place on gs://
#          --yes             do not ask before creating a slice, which costs money, or deleting one; needed in scripts
#          --dry-run         print the commands instead of running them
# Options may also stand after the subcommand and after CONFIG. What follows -- goes to simcse-jax train.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=${TPU_NAME:-} type=${TPU_TYPE:-} project=${CLOUDSDK_CORE_PROJECT:-} zone=${CLOUDSDK_COMPUTE_ZONE:-}
slices=${TPU_SLICES:-1}
runtime='' spot=() files=() shared=false
option() {
    case $1 in
        --yes) yes=true ;;
        --spot) spot=(--spot) ;;
        --shared) shared=true ;;
        --name) name=$2 ;;
        --type) type=$2 ;;
        --slices) slices=$2 ;;
        --project) project=$2 ;;
        --zone) zone=$2 ;;
        --runtime) runtime=$2 ;;
        --file) files+=("$2") ;;
    esac
}
take 2 '--yes --spot --shared' '--name --type --slices --project --zone --runtime --file' "$@"
command=${rest[0]:-}
set -- "${rest[@]:1}"
check_slices "$slices"
case $command in
    create | setup | status | stop | delete) [ $# -eq 0 ] || fail "$command takes options alone; got '$*'" ;;
    logs)
        [[ $* =~ ^[0-9]*( (0|[1-9][0-9]{0,3}))?$ && ${BASH_REMATCH[2]:-0} -lt $slices ]] ||
            fail "logs takes the number of one worker; got '$*'; after it, with --slices, the number of its slice"
        ;;
    start | resume)
        check_config "$@"
        over_slices "$slices" "$@"
        set -- "${rest[@]}"
        ;;
    *) fail "give one of create, setup, start, logs, status, stop, resume, delete; got '$command'; see --help" ;;
esac

if need gcloud "install the Google Cloud CLI and run gcloud auth login"; then
    project=${project:-$(gcloud config get-value project 2>/dev/null || true)}
    zone=${zone:-$(gcloud config get-value compute/zone 2>/dev/null || true)}
fi
[ -n "$name" ] || fail "give the slice a --name, or set TPU_NAME"
[ -n "$project" ] || fail "no project: give --project, or run gcloud config set project ID"
[ -n "$zone" ] || fail "no zone: give --zone, or run gcloud config set compute/zone ZONE"
where=(--project="$project" --zone="$zone")

root=$(dirname "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")")
wheel=simcse_jax-$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")-py3-none-any.whl

# As Cloud TPU names the slices of one queued resource.
nodes=("$name") which="the slice $name"
if [ "$slices" -gt 1 ]; then
    nodes=()
    for ((slice = 0; slice < slices; slice++)); do nodes+=("$name-$slice"); done
    which="the $slices slices $name-0 to $name-$((slices - 1))"
fi
node=$'\1' # stands for the name of each slice in the words of a command; no other word has it

# each ARGUMENT ...: runs gcloud compute tpus tpu-vm with these arguments for every slice, at once.
each() {
    local slice
    if "$dry_run" || [ ${#nodes[@]} -eq 1 ]; then
        for slice in "${nodes[@]}"; do run gcloud compute tpus tpu-vm "${@//$node/$slice}"; done
    else # as jobs of this shell, they would not hear Ctrl-C
        printf '%s\n' "${nodes[@]}" | xargs -P 0 -I "$node" gcloud compute tpus tpu-vm "$@"
    fi
}

# on WORKER ARGUMENT ...: runs tpu_worker.sh with these arguments on this worker of every slice, or on all workers.
on() {
    each ssh "$node" "${where[@]}" --worker="$1" --command="$(printf '%q ' bash tpu_worker.sh "${@:2}")"
}

# state: the state of the queued resource, or NONE if it does not exist.
state() {
    local said
    if said=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>&1); then
        printf '%s\n' "$said"
    elif [[ $said == *NOT_FOUND* || $said == *"not found"* ]]; then
        echo NONE
    else
        fail "gcloud fails: $said"
    fi
}

await() {
    if "$dry_run"; then
        echo "# until it prints ACTIVE:"
        run gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
        return
    fi
    local now last=
    while :; do
        now=$(state)
        [ "$now" != ACTIVE ] || break
        [ "$now" = "$last" ] || echo "$name is $now"
        case $now in NONE | FAILED | SUSPEND*) fail "the slice will not come: delete it, and create it again" ;; esac
        last=$now
        sleep "${TPU_POLL_SECONDS:-30}"
    done
    echo "$name is ACTIVE"
}

create() {
    [ -n "$type" ] || fail "give the slice a --type, e.g. v5litepod-16, or set TPU_TYPE"
    if [ -z "$runtime" ]; then
        case $type in
            v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            *) fail "no image is known for '$type': name one with --runtime" ;;
        esac
    fi
    local ids=(--node-id="$name")
    [ "$slices" -eq 1 ] || ids=(--node-count="$slices" --node-prefix="$name")
    confirm "this asks for $which of type $type, which costs money until it is deleted"
    run gcloud compute tpus queued-resources create "$name" "${ids[@]}" "${where[@]}" \
        --accelerator-type="$type" --runtime-version="$runtime" "${spot[@]}"
    await
}

setup() {
    need python3 "building the package needs Python and pip" || true
    local file
    for file in "${files[@]}"; do [ -e "$file" ] || fail "no file $file"; done
    run python3 -m pip wheel --quiet --no-deps --wheel-dir "$root/dist" "$root"
    each scp --recurse "$root/dist/$wheel" "$root/launch/tpu_worker.sh" "${files[@]}" "$node:" "${where[@]}" --worker=all
    on all install "$wheel"
}

# start ARGUMENT ...: checks and starts the run.
start() {
    local output
    output=$(value_of --output runs/default "$@")
    "$shared" || [[ $output == *://* ]] || fail "workers do not share --output $output: give a place on gs://, or" \
        "with --shared a folder that all of them mount"
    on all start "$@"
}

# delete: deletes the queued resource with its slices.
delete() {
    confirm "this deletes $which and all on the disks"
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

resume() {
    [ $# -gt 0 ] || fail "give the config and options that the run was started with"
    local now=SUSPENDED seen
    if "$dry_run"; then
        echo "# if the slice was preempted; if it is there, only what starts the run:"
    else
        now=$(state)
    fi
    case $now in
        ACTIVE)
            seen=$(on 0 report) || seen+=$'\nnot set up' # or out of reach: setup will say so
            if [[ $seen == *running* ]]; then
                echo "$name is running the run: nothing to do" && return
            elif [[ $seen == *"not set up"* ]]; then
                setup
            elif ! grep -qvx "ended 0" <<<"$seen"; then
                echo "the run is done: nothing to resume" && return
            fi
            ;;
        # No lists of &&: in them, a failing command would not end the script.
        NONE)
            create
            setup
            ;;
        SUSPEND* | FAILED)
            delete
            create
            setup
            ;;
        *)
            await
            setup
            ;;
    esac
    start "$@"
}

case $command in
    create | setup | start | resume | delete) "$command" "$@" ;;
    logs)
        nodes=("${nodes[${2:-0}]}")
        each ssh "$node" "${where[@]}" --worker="${1:-0}" --command="tail -n 50 -F simcse.log"
        ;;
    status)
        run gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
        status=0
        for slice in "${nodes[@]}"; do # in turn, because the reports do not name their slice
            [ "$slices" -eq 1 ] || echo "# $slice"
            nodes=("$slice")
            on all report || status=$?
        done
        exit "$status"
        ;;
    stop) on all stop ;;
esac
