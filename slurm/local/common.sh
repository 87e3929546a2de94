# What up.sh and down.sh share: the folder of the local cluster, and which of its daemons run.
# shellcheck shell=bash
folder=${MMDIT_SLURM:-$HOME/.local/state/mmdit-slurm}

die() {
    echo "${0##*/}: $1" >&2
    exit "${2:-1}"
}

# The process of daemon $1 if it runs: the one that its pid file names, while that is still the daemon of this folder.
pid_of() {
    local pid
    pid=$(cat "$folder/$1.pid" 2>/dev/null) && [ -n "$pid" ] || return 1
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1%%.*}" ] || return 1
    cat "/proc/$pid/cmdline" "/proc/$pid/environ" 2>/dev/null | grep -qaF "$folder/" || return 1
    echo "$pid"
}
