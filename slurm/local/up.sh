#!/usr/bin/env bash
# A real Slurm with four nodes on this one machine: to try the scripts with, and for the tests. Jobs go to n1 and n2, the
# partition main; in the partition low, n3 and n4, they make room for those of the partition urgent.
#   slurm/local/up.sh [--accounting]     --accounting: with slurmdbd and MariaDB, for sacct and sreport
# Everything lies in one folder, MMDIT_SLURM or ~/.local/state/mmdit-slurm; ports are of its own. /etc/slurm, /etc/munge
# and /run/munge are neither read nor written. Jobs are those of the user who starts it, and there is no authentication
# beyond that user: not for a machine that others compute on.
# Exit code 3: what it needs is not installed, and cannot be from here.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
cd "$(dirname "$0")"
. ./common.sh

accounting=
for argument in "$@"; do
    case $argument in
    --accounting) accounting=1 ;;
    *) die "unknown option $argument; there is --accounting" 2 ;;
    esac
done

# Nothing is written over what another cluster, or somebody else, put there.
refuse_foreign_folder() {
    if [ -e "$folder/slurm.conf" ]; then
        grep -q '^ClusterName=mmdit-local$' "$folder/slurm.conf" ||
            die "$folder holds the slurm.conf of another cluster: give MMDIT_SLURM another folder"
    elif [ -d "$folder" ] && [ -n "$(ls -A "$folder")" ]; then
        die "$folder is not empty and not of this script: give MMDIT_SLURM another folder"
    fi
}

install_missing() {
    local packages=()
    command -v munged >/dev/null || packages+=(munge)
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null || packages+=(slurm-wlm)
    if [ "$accounting" ]; then
        command -v slurmdbd >/dev/null || packages+=(slurmdbd)
        command -v mariadbd >/dev/null || packages+=(mariadb-server)
    fi
    [ ${#packages[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "needs ${packages[*]}, and this system has no apt-get" 3
    [ "$(id -u)" = 0 ] || die "needs ${packages[*]}: apt-get install ${packages[*]}, as root" 3
    echo "installing ${packages[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null || {
        die "apt-get could not install ${packages[*]}" 3
    }
}

# What is left of a cluster whose controller was killed goes on beside a new one.
any_of_ours() {
    pid_of slurmd.n1 || pid_of slurmd.n2 || pid_of slurmd.n3 || pid_of slurmd.n4 || pid_of slurmdbd
} >/dev/null

# Ports of our own that another daemon listens on belong to another cluster on this machine.
refuse_taken_ports() {
    local port
    for port in 16817 16818 16819 17001 17002 17003 17004; do
        if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            die "port $port is taken: another local cluster runs on this machine (MMDIT_SLURM names its folder)"
        fi
    done
}

write_configuration() {
    local host user
    mkdir -p "$folder"/{ctld,n1,n2,n3,n4}
    chmod 700 "$folder"
    host=$(hostname -s) user=$(id -un)
    # More CPUs than there are (config_overrides), so that two-node jobs stand beside each other on two cores; intervals
    # short enough to wait for. KillWait is 30 s on most clusters.
    cat >"$folder/slurm.conf" <<END
ClusterName=mmdit-local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/ctld
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
PlugStackConfig=$folder/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=bf_interval=2,sched_min_interval=500000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=10
SlurmdTimeout=20
MessageTimeout=20
JobAcctGatherType=jobacct_gather/linux
NodeName=n[1-4] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17004] CPUs=8 RealMemory=$(free -m | awk '/^Mem/ {print $2}')
PartitionName=main Nodes=n[1-2] Default=YES
PartitionName=low Nodes=n[3-4] PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[3-4] PriorityTier=2 PreemptMode=OFF
END
    : >"$folder/plugstack.conf"
    if [ "$accounting" ]; then
        cat >>"$folder/slurm.conf" <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass=$folder/munge.socket
END
        cat >"$folder/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=$user
PidFile=$folder/slurmdbd.pid
LogFile=$folder/slurmdbd.log
StorageType=accounting_storage/mysql
StorageUser=$user
END
        chmod 600 "$folder/slurmdbd.conf"
    fi
    cat >"$folder/env.sh" <<END
# source this file, and sbatch, squeue and the others speak to the local cluster
export SLURM_CONF=$folder/slurm.conf
END
}

# start NAME COMMAND …: a daemon that goes to the background by itself
start() {
    local name=$1
    pid_of "$name" >/dev/null && return
    shift
    "$@" >"$folder/$name.out" 2>&1 || die "$name did not start: $(tail -n 3 "$folder/$name.out")"
}

# until SECONDS WHAT COMMAND …: wait until COMMAND succeeds
until_ready() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || die "$what did not come up; the logs are in $folder"
        sleep 0.2
    done
}

start_munge() {
    [ -e "$folder/munge.key" ] || mungekey --create --keyfile="$folder/munge.key"
    # --force: it wants a folder that everybody can enter, for other users' jobs
    start munged munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
}

start_accounting() {
    local data=$folder/mariadb
    if ! pid_of mariadbd >/dev/null; then
        [ -d "$data/mysql" ] || mariadb-install-db --no-defaults --datadir="$data" --user="$(id -un)" --skip-test-db \
            --auth-root-authentication-method=socket --auth-root-socket-user="$(id -un)" >"$folder/mariadbd.out" 2>&1
        mariadbd --no-defaults --user="$(id -un)" --datadir="$data" --socket="$folder/mariadb.socket" --skip-networking \
            --pid-file="$folder/mariadbd.pid" --log-error="$folder/mariadbd.log" </dev/null >/dev/null 2>&1 &
        until_ready 60 MariaDB mariadb-admin --no-defaults --socket="$folder/mariadb.socket" ping
    fi
    export MYSQL_UNIX_PORT=$folder/mariadb.socket # where slurmdbd's client library looks for the server
    start slurmdbd env SLURM_CONF="$folder/slurm.conf" slurmdbd
    until_ready 60 slurmdbd sacctmgr -n show cluster
    sacctmgr -n -P show cluster format=cluster | grep -x mmdit-local >/dev/null ||
        sacctmgr -i add cluster mmdit-local >/dev/null
}

all_up() {
    [ "$(sinfo -h -N -p main,low -o '%T' | grep -cE '^(idle|mixed|allocated)$')" = 4 ]
}

refuse_foreign_folder
install_missing
if pid_of slurmctld >/dev/null; then
    [ -z "$accounting" ] || grep -q '^AccountingStorageType' "$folder/slurm.conf" ||
        die "it runs without accounting: down.sh first"
else
    any_of_ours || refuse_taken_ports
    write_configuration
fi
# shellcheck source=/dev/null
. "$folder/env.sh"
start_munge
[ -z "$accounting" ] || start_accounting
start slurmctld slurmctld -f "$SLURM_CONF"
for node in n1 n2 n3 n4; do
    start "slurmd.$node" slurmd -f "$SLURM_CONF" -N "$node"
done
until_ready 60 "the cluster" all_up
echo "nodes n1 to n4 are up; in each shell that is to use them:  source $folder/env.sh"
