# What the scripts of this folder share: one srun step a node and rank, and what follows its end. Sourced at the
# repository's root, inside a batch job.
# shellcheck shell=bash

set +u # functions of environment modules read variables that are not set
# shellcheck source=slurm/cluster.env
source slurm/cluster.env
set -u

# As scontrol names this job: a bare number would be all tasks of an array.
job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
logs=slurm/logs/${SLURM_JOB_NAME//[^A-Za-z0-9._-]/_}-$job # srun expands % in it
signalled='' # whether this shell was
step=''      # srun's process

say() {
    echo "$(date +%FT%T) $SLURM_JOB_NAME $job: $1"
}

# A job that was cancelled, or that Slurm itself requeues, is left alone, and so is its next life: Slurm starts it beside
# what is left of this one on a node that it had lost sight of.
requeue_if_running() {
    local known said=''
    for _ in {1..6}; do # slurmctld may be busy, or away for a moment
        if known=$(scontrol show job "$job" --oneliner); then
            [[ $known == *' JobState=RUNNING '* && $known == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || return 0
            [ "$said" ] || say "$1: requeued" # before it is: a job that is requeued is ended
            said=1
            scontrol requeue "$job" && return 0
        fi
        sleep 10 || true
    done
    say "$1: Slurm does not answer, so it is not requeued"
}

# Through srun, which passes the signal on to each rank.
ask_to_stop() {
    signalled=1
    say "asked to stop"
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true
}

# run ARGUMENTS …: `mmdit ARGUMENTS` as one task a GPU, else as many a node as --ntasks-per-node said, else one.
#
# Exit code 85 (asked to stop, saved) requeues the job, and so does any other end after this shell was signalled, at most
# MAX_RETRIES times in a row: it has not saved. Exit code 2 is the user's to mend and ends it. Any other failure starts
# the step again, MAX_RETRIES times.
run() {
    local tasks=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}} failures=0 code rank=0
    local shown # without passwords and tokens of URLs: the job's log is for everyone
    shown=$(PYTHONIOENCODING=utf-8 python -m stack.shown mmdit "$@" 2>/dev/null) || shown="mmdit $1 …"
    local unsaved=$logs.unsaved # a line for each life that was asked to stop and did not save
    local cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_GPU:-}}
    local srun=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * tasks))"
        --ntasks-per-node="$tasks" ${cpus:+--cpus-per-task="$cpus"}
        --kill-on-bad-exit=1 --open-mode=append --output="$logs-%t.log")

    # The same on each rank and after each restart, or sums are taken in another order.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${cpus:-1}}
    # malloc keeps what was freed, as for the ranks that `--ranks` starts (launch/environment.py).
    export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
    # srun reports the highest code of all tasks, which is that of the ranks that it ended itself: the code and number of
    # the first one to end stand here.
    export MMDIT_FIRST_EXIT="$PWD/$logs.exit"

    trap 'ask_to_stop' USR1 USR2 TERM # --signal= and preemption reach this shell alone
    while :; do
        rm -f "$MMDIT_FIRST_EXIT"
        say "$shown on $SLURM_JOB_NODELIST, $tasks a node; ranks' logs: $logs-*.log"
        "${srun[@]}" python -m launch.cli "$@" &
        step=$!
        if [ "$signalled" ]; then # it came between two steps; srun is deaf at first
            sleep 1 || true
            kill -USR1 "$step" 2>/dev/null || true
        fi
        while kill -0 "$step" 2>/dev/null; do # a `wait` that a signal interrupts may lose the step's exit code
            sleep 1 || true # killed where all processes of this script are signalled
        done
        code=0
        wait "$step" || code=$?
        step=''
        if [ $code != 0 ] && [ -s "$MMDIT_FIRST_EXIT" ]; then
            read -r code rank <"$MMDIT_FIRST_EXIT"
        fi
        rm -f "$MMDIT_FIRST_EXIT"
        case $code in
        0)
            rm -f "$unsaved"
            return
            ;;
        2)
            tail -n 3 "$logs-$rank.log" || true
            say "exit code 2: stopped"
            exit 2
            ;;
        esac
        if [ "$code" = 85 ]; then
            rm -f "$unsaved"
        elif [ "$signalled" ]; then
            echo "$code" >>"$unsaved"
            if [ "$(wc -l <"$unsaved")" -gt "$MAX_RETRIES" ]; then
                say "exit code $code, asked to stop $((MAX_RETRIES + 1)) times in a row before anything was saved: given up"
                exit "$code"
            fi
        fi
        if [ "$code" = 85 ] || [ "$signalled" ]; then
            requeue_if_running "exit code $code"
            exit "$code"
        fi
        failures=$((failures + 1))
        if [ $failures -gt "$MAX_RETRIES" ]; then
            say "exit code $code, failure $failures: given up"
            exit "$code"
        fi
        say "exit code $code: again ($failures of $MAX_RETRIES)"
    done
}
