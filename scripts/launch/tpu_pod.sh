#!/bin/bash
# Train on all hosts of a Cloud TPU slice:
#
#   scripts/launch/tpu_pod.sh my-v5p-64 us-east5-a configs/long_context.py /mnt/shared/runs/long
#   scripts/launch/tpu_pod.sh my-v5p-64 us-east5-a CONFIG RUN_DIR --config.mesh.fsdp=32
#
# Every host has irope installed, and a checkout in ~/irope (IROPE_HOME names another place). The run directory lies on
# a file system they share, such as Filestore. The hosts find each other by their metadata server. A host that is about
# to be preempted or maintained tells so there: all save and leave; this script then starts them again, RESTARTS times
# at most (20).

usage="usage: scripts/launch/tpu_pod.sh TPU ZONE CONFIG RUN_DIR [--config.a.b=VALUE ...]"
tpu=${1:?$usage}
zone=${2:?$usage}
config=${3:?$usage}
run=${4:?$usage}
shift 4

printf -v command '%q ' irope train --config="$config" --run-dir="$run" "$@"
home=${IROPE_HOME:-irope}

for ((tries = 0; tries <= ${RESTARTS:-20}; tries++)); do
    gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="cd $(printf '%q' "$home") && $command"
    code=$?
    # 2: the command or the config is wrong. 255: ssh, when the slice itself is gone and has to be made anew.
    case "$code" in
    0 | 2 | 255) exit "$code" ;;
    esac
    echo "ended with exit code $code; starting again in 30 s" >&2
    sleep 30
done
exit "$code"
