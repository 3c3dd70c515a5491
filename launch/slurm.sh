#!/usr/bin/env bash
# Submits a training run to SLURM, one process per GPU on one node or many; the job runs slurm.sbatch beside this file.
#
#     launch/slurm.sh [--dry-run] [--shared] [--nodes=N] [--gpus-per-node=N] [--OPTION=VALUE of sbatch ...]
#                     CONFIG [options of simcse-jax train]
#
# The job saves before its time limit and when it is preempted, goes back to the queue and continues from there.
# --gpus-per-node=0 trains on CPUs, one process per node. --shared says that --output is on shared storage, if the type
# of its file system does not show it. --dry-run prints the command instead of running it. Both, --nodes and
# --gpus-per-node may also stand after CONFIG.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=1 gpus=1 shared=false
options=()
option() {
    case $1 in
        --shared) shared=true ;;
        --nodes) nodes=$2 ;;
        --gpus-per-node) gpus=$2 ;;
    esac
}
stray() {
    [[ $1 == --*=* || $1 == --exclusive ]] || fail "give options of sbatch as --name=value; got $1"
    options+=("$1")
}
take 1 --shared '--nodes --gpus-per-node' "$@"
set -- "${rest[@]}"
check_config "$@"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes takes a number; got '$nodes'"
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus-per-node takes a number; got '$gpus'"

[[ " ${options[*]}" != *" --output="* || " $*" == *" --output"* ]] || fail "--output before the config is sbatch's, the" \
    "file of the log: give the run's folder after the config"

need sbatch "submit from a login node of a SLURM cluster" || true
need_package cuda

# JAX gives each process of a SLURM job the GPU of its SLURM_LOCALID.
tasks=$((gpus > 0 ? gpus : 1))
output=$(value_of --output runs/default "$@")
if [[ $output == *://* ]]; then
    [[ $output == gs://* || $((nodes * tasks)) -eq 1 ]] || fail "--output $output is on an object store that several" \
        "processes cannot write to: give a place on gs:// or a folder on shared storage"
elif [ "$nodes" -gt 1 ] && ! "$shared"; then
    folder=$(realpath --canonicalize-missing -- "$output")
    while [ ! -e "$folder" ]; do folder=$(dirname -- "$folder"); done
    type=$(stat --file-system --format=%T -- "$folder")
    case $type in
        ext2/ext3 | xfs | btrfs | zfs | tmpfs | ramfs | overlayfs)
            fail "--output $output is on $type, which other nodes do not see: give a folder on shared storage, or" \
                "--shared if it is shared (exported by this host, say)"
            ;;
    esac
fi

if [ "$gpus" -gt 0 ]; then options+=(--gpus-per-node="$gpus"); fi
job=$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/slurm.sbatch
run sbatch --nodes="$nodes" --ntasks-per-node="$tasks" "${options[@]}" "$job" "$@"
