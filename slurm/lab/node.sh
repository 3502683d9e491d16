#!/bin/bash
# The slurmd of one node of the lab in SLURM_LAB_DIR. Usage: node.sh up|down|crash NAME
#   up:    start it with its own host name and hosts file (and its own network in veth mode)
#   down:  stop it politely; its jobs go on under their slurmstepd
#   crash: KILL it, its slurmstepds and all their processes, as a power failure would
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
. "$here/lab.env.sh"
[ $# = 2 ] || { echo "usage: node.sh up|down|crash NAME" >&2; exit 2; }
lab=$SLURM_LAB_DIR action=$1 node=$2
daemon() {
  local pid
  # a process that has ended and waits for its parent has no namespace any more
  pid=$(cat "$lab/run/slurmd-$node.pid" 2>/dev/null) && readlink "/proc/$pid/ns/uts" > /dev/null && echo "$pid" && return
  echo "no slurmd of node $node is running in $lab" >&2
  exit 1
}
case $action in
  up)
    # jobs inherit both namespaces: `hostname` tells the nodes apart and every node name resolves
    # shellcheck disable=SC2016
    inside='hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts; export SLURM_CONF=$2/etc/slurm.conf; exec slurmd -N "$1"'
    command=(unshare --uts --mount --propagation private bash -c "$inside" lab "$node" "$lab")
    network=/var/run/netns/slab$SLURM_LAB_PORT_BASE-$node
    [ -e "$network" ] && command=(nsenter --net="$network" "${command[@]}")
    (cd / && env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 "${command[@]}") >> "$lab/log/slurmd-$node.out" 2>&1 < /dev/null
    ;;
  down) pid=$(daemon); kill "$pid" ;;
  crash)
    # every process that shares the host name namespace of this slurmd belongs to the node
    pid=$(daemon)
    namespace=$(readlink "/proc/$pid/ns/uts")
    [ "$namespace" != "$(readlink /proc/self/ns/uts)" ] || { echo "slurmd $pid has no namespace of its own" >&2; exit 1; }
    for process in /proc/[0-9]*; do
      if [ "$(readlink "$process/ns/uts" 2>/dev/null)" = "$namespace" ]; then kill -KILL "${process#/proc/}" 2>/dev/null || true; fi
    done
    ;;
  *) echo "unknown action $action; use up, down or crash" >&2; exit 2 ;;
esac
