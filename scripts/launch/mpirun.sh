#!/bin/bash
# Train under Open MPI, version 4 or 5:
#
#   scripts/launch/mpirun.sh hosts.txt 16 configs/quickstart.py:irope /shared/runs/quickstart
#
# hosts.txt is a hostfile of mpirun (HOST slots=N); 16 is the number of processes. The first host is where they meet,
# on PORT (8476). The run directory lies on a file system that all hosts share. mpirun passes SIGTERM and SIGUSR1 on,
# and ends all when one fails; all are then started again, RESTARTS times at most (3).

usage="usage: scripts/launch/mpirun.sh HOSTFILE PROCESSES CONFIG RUN_DIR [--config.a.b=VALUE ...]"
list=${1:?$usage}
processes=${2:?$usage}
config=${3:?$usage}
run=${4:?$usage}
shift 4

read -r first _ < <(grep -Ev '^[[:space:]]*(#|$)' "$list")
[ -n "$first" ] || { echo "$list: no hosts" >&2; exit 2; }
meet="$first:${PORT:-8476}"

asked=
trap 'asked=1; kill -TERM "$running"' TERM INT
trap 'asked=1; kill -USR1 "$running"' USR1

# Which process it is, each learns from mpirun; version 5 does not tell where the others are.
# shellcheck disable=SC2016
place='exec "$@" --coordinator="$0" --process-id="$OMPI_COMM_WORLD_RANK" --num-processes="$OMPI_COMM_WORLD_SIZE"'

for ((tries = 0; tries <= ${RESTARTS:-3}; tries++)); do
    mpirun -np "$processes" --hostfile "$list" \
        bash -c "$place" "$meet" irope train --config="$config" --run-dir="$run" "$@" &
    running=$!
    wait "$running"
    code=$?
    while kill -0 "$running" 2>/dev/null; do # a signal ended the wait, not mpirun
        wait "$running"
        code=$?
    done
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ -n "$asked" ]; then
        exit "$code"
    fi
    echo "ended with exit code $code; starting all again" >&2
done
exit "$code"
