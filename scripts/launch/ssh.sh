#!/bin/bash
# Train on machines that are reached by ssh, one process on each:
#
#   scripts/launch/ssh.sh hosts.txt configs/quickstart.py:irope /shared/runs/quickstart
#   PORT=9000 RESTARTS=5 scripts/launch/ssh.sh hosts.txt CONFIG RUN_DIR --config.mesh.data=16
#
# hosts.txt has one host a line, as ssh and the other hosts know it; the first is where all meet, on PORT (8476). Every
# host has irope installed, and a checkout in ~/irope (IROPE_HOME names another place). The run directory lies on a file
# system they share. Ctrl-C and SIGTERM save and leave. When a process dies the others end within a minute, and all are
# started again, RESTARTS times at most (3).

usage="usage: scripts/launch/ssh.sh HOSTS_FILE CONFIG RUN_DIR [--config.a.b=VALUE ...]"
list=${1:?$usage}
config=${2:?$usage}
run=${3:?$usage}
shift 3

mapfile -t hosts < <(grep -Ev '^[[:space:]]*(#|$)' "$list")
[ "${#hosts[@]}" -gt 0 ] || { echo "$list: no hosts" >&2; exit 2; }
printf -v command '%q ' irope train --config="$config" --run-dir="$run" "$@"
home=$(printf '%q' "${IROPE_HOME:-irope}")
pidfile=".irope.$$.pid"

# A signal to one process stops all of them at the same step.
stop() {
    asked=1
    ssh "${hosts[0]}" "cd $home && kill -TERM \$(cat $pidfile)"
}
trap stop INT TERM

asked=
for ((tries = 0; tries <= ${RESTARTS:-3}; tries++)); do
    started=()
    for k in "${!hosts[@]}"; do
        place="--coordinator=${hosts[0]}:${PORT:-8476} --process-id=$k --num-processes=${#hosts[@]}"
        remember=
        [ "$k" -eq 0 ] && remember="echo \$\$ > $pidfile &&"
        # setsid: Ctrl-C does not cut the connection, so that the processes can save
        setsid ssh "${hosts[$k]}" "cd $home && $remember exec $command $place" </dev/null &
        started+=($!)
    done
    code=0
    for k in "${!started[@]}"; do
        wait "${started[$k]}"
        one=$?
        while kill -0 "${started[$k]}" 2>/dev/null; do # a signal ended the wait, not the process
            wait "${started[$k]}"
            one=$?
        done
        [ "$one" -ne 0 ] && echo "process $k on ${hosts[$k]} ended with exit code $one" >&2
        # 2, a wrong command or config, outweighs what it made of the others
        { [ "$one" -eq 2 ] || [ "$code" -eq 0 ]; } && code=$one
    done
    ssh "${hosts[0]}" "cd $home && rm -f $pidfile"
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ -n "$asked" ]; then
        exit "$code"
    fi
    echo "starting all again" >&2
done
exit "$code"
