#!/bin/bash
# Stops everything that start.sh started in SLURM_LAB_DIR, and what an earlier start left behind; touches no other lab.
# Usage: stop.sh [--quiet] [--purge]      the logs stay; --purge removes the directory too
set -u   # no pipefail: grep -q ends early on purpose
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
. "$here/lab.env.sh"
lab=$SLURM_LAB_DIR
quiet=; purge=
for option in "$@"; do
  case $option in
    --quiet) quiet=1 ;;
    --purge) purge=1 ;;
    *) echo "unknown option $option; use --quiet or --purge" >&2; exit 2 ;;
  esac
done

# a daemon is ours if it works under our slurm.conf or names our directory on its command line
daemons() {
  local pid
  for pid in $(find /proc -maxdepth 2 -path '/proc/[0-9]*/exe' -printf '%h %l\n' 2>/dev/null |
      awk '$2 ~ "/(slurmctld|slurmd|slurmstepd|slurmdbd|munged|mariadbd)(-wlm)?$" { print substr($1, 7) }'); do
    if grep -aqF -- "$lab/" "/proc/$pid/environ" "/proc/$pid/cmdline" 2>/dev/null; then echo "$pid"; fi
  done
}
# the host name namespaces of these processes, ours excepted: every process in one of them belongs to a node
namespaces_of() {
  local pid
  for pid in "$@"; do readlink "/proc/$pid/ns/uts" 2>/dev/null; done | sort -u | grep -vxF "$(readlink /proc/self/ns/uts)"
}
members_of() {   # $1: namespaces, one per line
  find /proc -maxdepth 3 -path '/proc/[0-9]*/ns/uts' -printf '%h %l\n' 2>/dev/null | grep -F -- "$1" |
    sed 's#/proc/\([0-9]*\)/ns .*#\1#'
}
wait_for_end() {   # $1: how many times 50 ms
  for _ in $(seq "$1"); do [ -z "$(daemons)" ] && return; sleep 0.05; done
}

if [ -e "$lab/.slurm_lab" ]; then
  # shellcheck disable=SC2046  # lists of numbers
  {
    namespaces=$(namespaces_of $(daemons))
    if [ -n "$namespaces" ]; then
      # again and again: a process may have forked between the look and the kill
      for _ in $(seq 100); do
        members=$(members_of "$namespaces")
        [ -n "$members" ] || break
        kill -KILL $members 2>/dev/null
        sleep 0.05
      done
    fi
    # slurmctld alone would wait many seconds for nodes that are gone; nothing of it is needed again
    kill $(daemons) 2>/dev/null; wait_for_end 20
    kill -KILL $(daemons) 2>/dev/null; wait_for_end 60
  }
  for name in munged mariadbd slurmctld slurmdbd; do rm -f "$lab/run/$name.pid"; done
fi
if command -v ip > /dev/null; then
  for name in $(ip netns list 2>/dev/null | awk -v p="slab$SLURM_LAB_PORT_BASE-" 'index($1, p) == 1 { print $1 }'); do ip netns del "$name"; done
  for name in $(ip -o link 2>/dev/null | grep -oE "slv$SLURM_LAB_PORT_BASE-[0-9]+" | sort -u); do ip link del "$name" 2>/dev/null; done
  ip link del "slb$SLURM_LAB_PORT_BASE" 2>/dev/null
fi
for group in /sys/fs/cgroup/*/slurm_"$SLURM_LAB_PREFIX"[0-9]*; do
  [ -d "$group" ] && find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null
done
[ -n "$purge" ] && [ -e "$lab/.slurm_lab" ] && rm -rf -- "$lab"
[ -n "$quiet" ] || echo "stopped the lab in $lab"
exit 0
