#!/usr/bin/env bash
# Virtual hosts on this machine for the tests: network namespaces h0, h1, … on a bridge of their own.
# Usage: VHOSTS_DIR=dir vhosts.sh probe | up [N] | shape RATE|none | run N_RANKS HOST:SLOTS,… COMMAND… | rsh HOST COMMAND… | down
# Host i has the address 10.78.0.<10+i>, its own hostname, /etc/hosts, /dev/shm and network; files are shared.
# `run` is mpirun (the one on PATH) over the hosts; `rsh` is what it starts its daemons by. Needs root and iproute2.
# `probe` says by its status whether this kernel has bridges, veth pairs and tbf, and lets us use them.
# Exit: 0 as asked; 1 did not come up; 2 bad usage; `run`: mpirun's own status.
set -euo pipefail

dir=${VHOSTS_DIR:?set VHOSTS_DIR}
export PATH="$PATH:/usr/sbin:/sbin" VHOSTS_DIR
self=$(readlink -f "$0")

say() { printf 'vhosts.sh: %s\n' "$*" >&2; }
pid() { cat "$dir/$1.pid"; }
inside() { # NAME COMMAND...
  local name=$1
  shift
  nsenter -t "$(pid "$name")" -n -u -m --wd="$PWD" -- "$@"
}

probe() { # can this kernel and its rules do it at all?
  if ! { command -v ip && command -v tc; } >/dev/null; then
    say "installing iproute2"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y iproute2 >/dev/null 2>&1 ||
      { apt-get update >/dev/null && apt-get install -y iproute2 >/dev/null 2>&1; }
  fi
  unshare -n -u -m sh -c 'ip link add br0 type bridge && ip link add veth0 type veth peer name veth1 &&
    tc qdisc add dev veth0 root tbf rate 1gbit burst 256kb limit 2mb'
}

up() { # N
  local i name t
  mkdir -p "$dir"
  { echo '127.0.0.1 localhost'
    for ((i = 0; i < $1; i++)); do printf '10.78.0.%d h%d\n' $((10 + i)) "$i"; done; } >"$dir/hosts"
  # A process that sleeps keeps each set of namespaces alive; its pid is the handle.
  cat >"$dir/host.sh" <<'HOST'
#!/bin/sh
set -e
mount --make-rprivate /
mount --bind "$2" /etc/hosts
mount -t tmpfs -o size=2g tmpfs /dev/shm
hostname "$1"
ip link set lo up
echo $$ >"$3"
exec sleep infinity
HOST
  chmod 755 "$dir/host.sh"
  for name in switch $(seq -f 'h%g' 0 $(($1 - 1))); do
    setsid unshare -n -u -m "$dir/host.sh" "$name" "$dir/hosts" "$dir/$name.pid" </dev/null >/dev/null 2>"$dir/$name.err" &
  done
  for name in switch $(seq -f 'h%g' 0 $(($1 - 1))); do
    for ((t = 0; t < 100; t++)); do if [[ -s $dir/$name.pid ]]; then break; fi; sleep 0.05; done
    [[ -s $dir/$name.pid ]] || { say "$name did not start: $(cat "$dir/$name.err")"; exit 1; }
  done
  inside switch ip link add br0 type bridge stp_state 0 forward_delay 0
  inside switch ip link set br0 up
  for ((i = 0; i < $1; i++)); do
    inside switch ip link add "p$i" type veth peer name eth0 netns "$(pid "h$i")"
    inside switch ip link set "p$i" master br0 up
    inside "h$i" ip addr add "10.78.0.$((10 + i))/24" dev eth0
    inside "h$i" ip link set eth0 up
  done
  echo "$1" >"$dir/count"
}

limit() { # NAME DEVICE RATE
  inside "$1" tc qdisc del dev "$2" root 2>/dev/null || true
  if [[ $3 != none ]]; then
    inside "$1" tc qdisc add dev "$2" root tbf rate "$3" burst 256kb limit 2mb
  fi
}

shape() { # RATE
  local i
  for ((i = 0; i < $(cat "$dir/count"); i++)); do
    limit "h$i" eth0 "$1"
    limit switch "p$i" "$1"
  done
}

run() { # RANKS HOSTS COMMAND...
  local ranks=$1 hosts=$2
  shift 2
  printf '#!/bin/sh\nexec %q rsh "$@"\n' "$self" >"$dir/rsh.sh"
  chmod 755 "$dir/rsh.sh"
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  export PRTE_MCA_plm=ssh PRTE_MCA_plm_ssh_agent="$dir/rsh.sh" PRTE_MCA_hwloc_default_binding_policy=none
  # more ranks than cores: waiting must give the core away, for the peers' calls too
  export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,sm,tcp OMPI_MCA_btl_tcp_if_include=eth0
  inside h0 mpirun -n "$ranks" --host "$hosts" --map-by slot "$@"
}

rsh() { # [OPTIONS] HOST COMMAND...: as ssh is called
  while [[ ${1:-} == -* ]]; do shift; done
  local host=$1
  shift
  inside "$host" /bin/sh -c "$*"
}

down() {
  local file process
  for file in "$dir"/*.pid; do
    if [[ -e $file ]]; then
      process=$(cat "$file")
      if [[ $(tr '\0' ' ' <"/proc/$process/cmdline" 2>/dev/null) == "sleep infinity " ]]; then kill "$process"; fi
      rm -f "$file"
    fi
  done
}

case ${1:-} in
  probe) probe ;;
  up) [[ $(id -u) == 0 ]] || { say "needs root"; exit 2; }; up "${2:-2}" ;;
  shape) shape "$2" ;;
  run) shift; run "$@" ;;
  rsh) shift; rsh "$@" ;;
  down) down ;;
  *) say "usage: VHOSTS_DIR=dir vhosts.sh probe | up [N] | shape RATE|none | run RANKS HOST:SLOTS,… COMMAND… | down"; exit 2 ;;
esac
