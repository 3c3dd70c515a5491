#!/usr/bin/env bash
# Trains on Kubernetes: a JobSet with one pod per host, on GPUs or on TPU slices of GKE.
#
#     launch/kubernetes.sh --name RUN --image IMAGE --hosts N --gpus N [options] CONFIG [options of simcse-jax train]
#     launch/kubernetes.sh --name RUN --image IMAGE --hosts N --tpu ACCELERATOR --topology T --chips N [options] CONFIG ...
#
# --gpus, --chips: number per host. ACCELERATOR and T as on the nodes' labels, e.g. tpu-v5-lite-podslice and 4x4.
# Options: --slices N              TPU slices, each of --hosts hosts, that train as one: `train` gets --mesh.dcn N
#          --claim NAME            a ReadWriteMany volume claim, mounted at /shared
#          --service-account NAME  gives the pods its rights, e.g. to a bucket
#          --namespace NAME        by default that of kubectl's context
#          --dry-run               print the manifest, with the command as a comment, instead of applying it
# They may also stand after CONFIG.
# An evicted pod saves, and the JobSet starts anew and continues; after other failures it starts again, at most 3 times.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' image='' hosts='' gpus='' tpu='' topology='' chips='' slices=1 claim='' account='' namespace=()
option() {
    case $1 in
        --name) name=$2 ;;
        --image) image=$2 ;;
        --hosts) hosts=$2 ;;
        --gpus) gpus=$2 ;;
        --tpu) tpu=$2 ;;
        --topology) topology=$2 ;;
        --chips) chips=$2 ;;
        --slices) slices=$2 ;;
        --claim) claim=$2 ;;
        --service-account) account=$2 ;;
        --namespace) namespace=(--namespace="$2") ;;
    esac
}
take 1 '' '--name --image --hosts --gpus --tpu --topology --chips --slices --claim --service-account --namespace' "$@"
check_config "${rest[@]}"
check_slices "$slices"
over_slices "$slices" "${rest[@]}"
set -- "${rest[@]}"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name takes up to 40 of a-z, 0-9 and -; got '$name'"
[ -n "$image" ] || fail "give the --image of a container with this package (launch/Dockerfile makes one)"
[[ $hosts =~ ^[1-9][0-9]*$ ]] || fail "--hosts takes a number; got '$hosts'"
if [ -n "$tpu" ]; then
    [ -z "$gpus" ] || fail "give either --gpus or --tpu"
    [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "give the --topology of the TPU slice, e.g. 4x4; got '$topology'"
    [[ $chips =~ ^[1-9][0-9]*$ ]] || fail "--chips takes the number of TPU chips of a host; got '$chips'"
    [ $((${topology//x/*})) -eq $((hosts * chips)) ] ||
        fail "a slice of $topology has $((${topology//x/*})) chips, not --hosts $hosts × --chips $chips"
else
    [ "$slices" -eq 1 ] || fail "--slices are of TPUs, and need --tpu; of GPUs, --mesh.dcn after the config takes the nodes"
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "give --gpus N, the GPUs of a host, or --tpu ACCELERATOR; got --gpus '$gpus'"
fi
output=$(value_of --output runs/default "$@")
[[ -n $claim && $output == /shared/* ]] || [[ $output == gs://* ]] || [[ $((hosts * slices)) -eq 1 && $output == *://* ]] ||
    fail "--output $output is lost with its pod, or not shared by the hosts: give a place on gs://, or --claim and a" \
        "folder in /shared"

# quoted TEXT ...: each as a YAML string, with commas between. Kubernetes takes $(NAME) for a variable, and $$( for $(.
quoted() {
    local text separator=''
    for text in "$@"; do
        [[ $text != *[[:cntrl:]]* ]] || fail "an argument has a line break or another control character: $text"
        text=${text//\\/\\\\} text=${text//\"/\\\"}
        printf '%s"%s"' "$separator" "${text//\$(/\$\$(}"
        separator=', '
    done
}

manifest() {
    cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
END
    [ "$slices" -eq 1 ] || cat <<END
  # Each Job gets a slice of its own, which is a node pool.
  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}
END
    cat <<END
spec:
  # The pods get this pod's address as an annotation.
  coordinator: {replicatedJob: hosts, jobIndex: 0, podIndex: 0}
  failurePolicy:
    maxRestarts: 3
    rules:
      # The Job's own rules below matched: evicted, or stopped and saved.
      - name: preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: hosts
      replicas: $slices
      template:
        spec:
          completionMode: Indexed
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
              - action: FailJob
                onExitCodes: {operator: In, values: [75]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 180
END
    [ -z "$account" ] || printf '              serviceAccountName: %s\n' "$(quoted "$account")"
    if [ -n "$tpu" ]; then
        cat <<END
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(quoted "$tpu")
                cloud.google.com/gke-tpu-topology: $(quoted "$topology")
END
    fi
    cat <<END
              containers:
                - name: train
                  image: $(quoted "$image")
                  command: [simcse-jax, train]
                  args: [$arguments]
                  env:
END
    if [ -n "$tpu" ]; then
        cat <<END
                    # GKE sets TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, in which JAX finds the other hosts.
                    - {name: JAX_PLATFORMS, value: "tpu,cpu"}
END
        [ "$slices" -eq 1 ] || cat <<END
                    # In these, JAX and the TPUs' runtime find the other slices.
                    - {name: MEGASCALE_NUM_SLICES, value: "$slices"}
                    - name: MEGASCALE_SLICE_ID
                      valueFrom: {fieldRef: {fieldPath: "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}
                    - name: MEGASCALE_COORDINATOR_ADDRESS
                      valueFrom: {fieldRef: {fieldPath: "metadata.annotations['jobset.sigs.k8s.io/coordinator']"}}
END
        cat <<END
                  resources:
                    limits: {google.com/tpu: $chips}
END
    else
        cat <<END
                    - {name: JAX_PLATFORMS, value: "cuda,cpu"}
                    - name: COORDINATOR
                      valueFrom: {fieldRef: {fieldPath: "metadata.annotations['jobset.sigs.k8s.io/coordinator']"}}
                    - {name: JAX_COORDINATOR_ADDRESS, value: "\$(COORDINATOR):8476"}
                    - {name: JAX_NUM_PROCESSES, value: "$hosts"}
                    - name: JAX_PROCESS_ID
                      valueFrom:
                        {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
                  resources:
                    limits: {nvidia.com/gpu: $gpus}
END
    fi
    [ -z "$claim" ] || cat <<END
                  volumeMounts: [{name: shared, mountPath: /shared}]
              volumes:
                - name: shared
                  persistentVolumeClaim: {claimName: $(quoted "$claim")}
END
}

arguments=$(quoted "$@" --multi-host --stopped-status 75)
text=$(manifest)
need kubectl "install it, and choose the cluster with kubectl config use-context" || true
if "$dry_run"; then
    printf '%s\n# %s\n' "$text" "$(run kubectl apply "${namespace[@]}" --filename=-)"
else
    run kubectl apply "${namespace[@]}" --filename=- <<<"$text"
fi
