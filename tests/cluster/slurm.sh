#!/usr/bin/env bash
# A real Slurm on this one machine for the tests: munged, slurmctld and a slurmd a node, no systemd.
# Usage: SLURM_TEST_DIR=dir slurm.sh up [NODES [CPUS]] | down
# Node i has its own hostname n<i> and /dev/shm and the address 127.0.1.<10+i>. Needs root; installs
# Debian's slurm-wlm where it is missing. After `up`: . "$SLURM_TEST_DIR/env.sh"
# Exit: 0 as asked; 1 did not come up or would not stop (logs are in the folder); 2 bad usage.
set -euo pipefail

dir=${SLURM_TEST_DIR:?set SLURM_TEST_DIR}
port=${SLURM_TEST_PORT:-27800}
export PATH="$PATH:/usr/sbin:/sbin" SLURM_CONF=$dir/slurm.conf SLURM_TEST_DIR

say() { printf 'slurm.sh: %s\n' "$*" >&2; }
is() { [[ -n ${1:-} && $(cat "/proc/$1/comm" 2>/dev/null) == "$2" ]]; } # PID NAME

install_slurm() {
  # libpmix-dev: the mpi/pmix plugin opens its libpmix.so, and slurmd must find it when it starts
  if ! { command -v slurmctld && command -v slurmd && command -v munged && dpkg -s libpmix-dev; } >/dev/null 2>&1; then
    say "installing slurm-wlm munge libpmix-dev"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y slurm-wlm munge libpmix-dev >/dev/null 2>&1 ||
      { apt-get update >/dev/null && apt-get install -y slurm-wlm munge libpmix-dev >/dev/null; }
  fi
}

configure() { # NODES CPUS
  local i
  mkdir -p "$dir/state" "$dir/log" "$dir/munge"
  chmod 755 "$dir" "$dir/munge"
  (umask 077; head -c 1024 /dev/urandom >"$dir/munge/key")
  { printf '127.0.0.1 localhost %s\n' "$(uname -n)"
    for ((i = 0; i < $1; i++)); do printf '127.0.1.%d n%d\n' $((10 + i)) "$i"; done; } >"$dir/hosts"
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(uname -n)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoAddrCache,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
TmpFS=$dir/tmp.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
KillWait=10
CompleteWait=0
MinJobAge=3600
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
CONF
  for ((i = 0; i < $1; i++)); do
    mkdir -p "$dir/tmp.n$i"
    printf 'NodeName=n%d NodeHostname=n%d NodeAddr=127.0.1.%d Port=%d Sockets=1 CoresPerSocket=%d ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN\n' \
      "$i" "$i" $((10 + i)) $((port + 10 + i)) "$2"
  done >>"$SLURM_CONF"
  printf 'PartitionName=test Nodes=n[0-%d] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n' $(($1 - 1)) >>"$SLURM_CONF"
  { printf 'export SLURM_CONF=%q\n' "$SLURM_CONF"
    # root is allowed; more ranks than cores: no binding, yield; MPI over loopback only
    echo 'export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1'
    echo 'export PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_hwloc_base_binding_policy=none'
    echo 'export OMPI_MCA_btl_tcp_if_include=lo OMPI_MCA_mpi_yield_when_idle=1'; } >"$dir/env.sh"
  cat >"$dir/node.sh" <<'NODE'
#!/bin/sh
# Give a slurmd its own hostname, /etc/hosts and /dev/shm, then become it.
set -e
mount --make-rprivate /
mount --bind "$2" /etc/hosts
mount -t tmpfs -o size=2g tmpfs /dev/shm
hostname "$1"
readlink /proc/self/ns/mnt >>"$SLURM_TEST_DIR/mntns"
exec slurmd -N "$1" -f "$SLURM_CONF"
NODE
  chmod 755 "$dir/node.sh"
}

up() { # NODES CPUS
  local i t
  install_slurm
  configure "$1" "$2"
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --num-threads=2 2>"$dir/log/munged.err"
  slurmctld -c -f "$SLURM_CONF" 2>>"$dir/log/slurmctld.err"
  for ((i = 0; i < $1; i++)); do
    unshare -u -m "$dir/node.sh" "n$i" "$dir/hosts" </dev/null >>"$dir/log/slurmd.n$i.err" 2>&1
  done
  for ((t = 0; t < 150; t++)); do
    if [[ $(sinfo -h -N -o %T 2>/dev/null | grep -cx idle) == "$1" ]]; then return 0; fi
    sleep 0.2
  done
  say "the nodes did not come up; see $dir/log"
  return 1
}

stop() { # PIDFILE NAME
  local p t signal
  p=$(cat "$1" 2>/dev/null || true)
  for signal in TERM KILL; do
    if is "$p" "$2"; then kill -"$signal" "$p" 2>/dev/null || true; fi
    for ((t = 0; t < 50; t++)); do is "$p" "$2" || break; sleep 0.1; done
  done
  if is "$p" "$2"; then say "$2 $p would not stop"; return 1; fi
}

down() {
  local rc=0 f d ns
  [[ -e $SLURM_CONF ]] || return 0
  timeout 10 scancel --user=root 2>/dev/null || true
  sleep 1
  for f in "$dir"/slurmd.*.pid; do if [[ -e $f ]]; then stop "$f" slurmd || rc=1; fi; done
  # Ranks left over live in a node's own mount namespace, under this cluster's configuration.
  for d in /proc/[0-9]*; do
    ns=$(readlink "$d/ns/mnt" 2>/dev/null || true)
    if [[ -n $ns ]] && grep -qxF "$ns" "$dir/mntns" 2>/dev/null &&
      { tr '\0' '\n' <"$d/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; } 2>/dev/null; then
      kill -9 "${d#/proc/}" 2>/dev/null || true
    fi
  done
  stop "$dir/slurmctld.pid" slurmctld || rc=1
  stop "$dir/munge/pid" munged || rc=1
  return "$rc"
}

case ${1:-} in
  up) [[ $(id -u) == 0 ]] || { say "needs root"; exit 2; }; up "${2:-2}" "${3:-4}" ;;
  down) down ;;
  *) say "usage: SLURM_TEST_DIR=dir slurm.sh up [NODES [CPUS]] | down"; exit 2 ;;
esac
