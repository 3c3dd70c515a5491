#!/usr/bin/env bash
# Trains on the GPUs of this machine, in one process: all of them, or those that --gpus names.
#
#     launch/local_gpus.sh [--dry-run] [--gpus 0,1] CONFIG [options of simcse-jax train]
#
# --gpus 0 takes the first GPU alone. --dry-run prints the command instead of running it. Both may also stand after CONFIG.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

gpus=
option() { gpus=$2; }
take 1 '' --gpus "$@"
set -- "${rest[@]}"
check_config "$@"
[[ $gpus =~ ^([0-9]+(,[0-9]+)*)?$ ]] || fail "--gpus takes numbers, as in --gpus 0,1; got '$gpus'"

need_package cuda
if need nvidia-smi "install NVIDIA's driver, or train on CPUs with simcse-jax train"; then
    found=$(nvidia-smi --query-gpu=index --format=csv,noheader) || fail "nvidia-smi fails, see above: is a GPU free?"
    for gpu in ${gpus//,/ }; do
        grep -qx "$gpu" <<<"$found" || fail "no GPU $gpu here; there are: ${found//$'\n'/, }"
    done
fi

# Without a working GPU, JAX would go on with CPUs; with the platform named, it fails.
run env JAX_PLATFORMS=cuda,cpu ${gpus:+CUDA_VISIBLE_DEVICES="$gpus"} simcse-jax train "$@"
