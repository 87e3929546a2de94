#!/usr/bin/env bash
# Stops the cluster that up.sh started, and the jobs on it. Its folder is kept: up.sh goes on with it.
set -euo pipefail
cd "$(dirname "$0")"
. ./common.sh

if pid_of slurmctld >/dev/null; then
    # shellcheck source=/dev/null
    . "$folder/env.sh"
    scancel --user="$(id -un)" || true
    for _ in {1..60}; do
        [ -n "$(squeue -h)" ] || break
        sleep 0.5
    done
fi
for daemon in slurmd.n{4,3,2,1} slurmctld slurmdbd mariadbd munged; do
    pid=$(pid_of "$daemon") || continue
    kill "$pid"
    for _ in {1..100}; do
        pid_of "$daemon" >/dev/null || continue 2
        sleep 0.1
    done
    echo "$daemon does not end: killed" >&2
    kill -KILL "$pid"
done
