#!/bin/bash
# Starts munged, (mariadbd, slurmdbd,) slurmctld and one slurmd per node in the private directory SLURM_LAB_DIR.
# Needs root on Debian; no systemd, nothing under /etc, no network. Ends with 0 when all nodes are idle; a start that
# fails stops what it started and says why. Usage: start.sh, then . "$SLURM_LAB_DIR/env" (it prints the line to use).
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034  # read by lab.env.sh
lab_is_new=1
. "$here/lab.env.sh"
lab=$SLURM_LAB_DIR prefix=$SLURM_LAB_PREFIX nodes=$SLURM_LAB_NODES base=$SLURM_LAB_PORT_BASE gpus=$SLURM_LAB_GPUS
gpu_type=$SLURM_LAB_GPU_TYPE
refuse() { echo "the lab cannot start: $*" >&2; exit 2; }
fail() { echo "the lab did not start: $*" >&2; exit 1; }
said() { tail -n 3 "$1" | paste -sd ';'; }   # the end of a log as one line
started=${EPOCHREALTIME//[.,]/}   # us; the decimal sign depends on the locale
say() {
  local passed=$(( (${EPOCHREALTIME//[.,]/} - started) / 10000 ))
  printf '%3d.%02d s  %s\n' $((passed / 100)) $((passed % 100)) "$*"
}

# --- what must be there
[ "$(id -u)" = 0 ] || refuse "it must run as root"
programs=(munged slurmctld slurmd sinfo unshare)
[ "$SLURM_LAB_ACCT" = dbd ] && programs+=(slurmdbd mariadbd mariadb-install-db sacctmgr)
[ "$SLURM_LAB_NET" = veth ] && programs+=(ip nsenter)
for program in "${programs[@]}"; do
  command -v "$program" > /dev/null || refuse "the program $program is missing; run $here/install_slurm.sh"
done
unshare --uts --mount --propagation private true 2> /dev/null || refuse "this machine forbids host name and mount namespaces"
# the sockets of munged and of job steps lie in it, and the kernel allows 107 characters for a socket's path
[ ${#lab} -le 60 ] || refuse "the path $lab is longer than 60 characters; set SLURM_LAB_DIR to a shorter one"
bash "$here/stop.sh" --quiet
[ ! -e "$lab" ] || [ -O "$lab" ] || refuse "$lab belongs to another user; set SLURM_LAB_DIR"
# the directory is ours only if it carries our mark, or does not exist, or is empty
if [ -e "$lab" ] && [ ! -e "$lab/.slurm_lab" ] && [ -n "$(ls -A "$lab")" ]; then
  refuse "$lab exists and is not the directory of a lab; set SLURM_LAB_DIR to another"
fi
answers() { (exec 3<> "/dev/tcp/$1/$2") 2> /dev/null; }
for port in $((base + 1)) $((base + 2)) $((base + 3)) $(seq $((base + 11)) $((base + 10 + nodes))); do
  ! answers 127.0.0.1 "$port" || refuse "port $port is in use; set SLURM_LAB_PORT_BASE to another than $base"
done

rm -rf -- "$lab"
umask 022
mkdir -p "$lab"/{etc,run,log,state,spool,dev,jobs}
: > "$lab/.slurm_lab"
chmod 755 "$lab" "$lab"/*
for name in SLURM_CONF SLURM_LAB_DIR SLURM_LAB_PORT_BASE SLURM_LAB_PREFIX SLURM_LAB_NODES SLURM_LAB_NET SLURM_LAB_ACCT; do
  printf 'export %s=%q\n' "$name" "${!name}"
done > "$lab/env"
printf 'export SLURM_LAB_BIN=%q\n' "$here" >> "$lab/env"
give_up() {
  local code=$?
  if [ $code != 0 ]; then bash "$here/stop.sh" --quiet; fi
  exit $code
}
trap give_up EXIT
trap 'exit 130' INT TERM HUP

# --- munge: own key and socket
mkdir -m 700 "$lab/munge"
head -c 1024 /dev/urandom > "$lab/munge/key"
chmod 400 "$lab/munge/key"
munged --force --key-file="$lab/munge/key" --socket="$lab/run/munge.socket" --pid-file="$lab/run/munged.pid" \
       --log-file="$lab/munge/log" --seed-file="$lab/munge/seed" > "$lab/log/munged.out" 2>&1 < /dev/null ||
  fail "munged: $(said "$lab/log/munged.out")"
say "munged is up"

# --- addresses and hosts file
controller=$(hostname -s)
echo "127.0.0.1 localhost" > "$lab/etc/hosts"
if [ "$SLURM_LAB_NET" = veth ]; then
  controller_address=$SLURM_LAB_SUBNET.1
  node_address="NodeAddr=$SLURM_LAB_SUBNET.[11-$((10 + nodes))] Port=$((base + 1))"
  echo "$controller_address $controller" >> "$lab/etc/hosts"
  ip link add "slb$base" type bridge
  ip addr add "$controller_address/24" dev "slb$base"
  ip link set "slb$base" up
  for i in $(seq "$nodes"); do
    network="slab$base-$prefix$i"
    echo "$SLURM_LAB_SUBNET.$((10 + i)) $prefix$i" >> "$lab/etc/hosts"
    ip netns add "$network"
    ip link add "slv$base-$i" type veth peer name eth0 netns "$network"
    ip link set "slv$base-$i" master "slb$base" up
    ip -n "$network" link set lo up
    ip -n "$network" addr add "$SLURM_LAB_SUBNET.$((10 + i))/24" dev eth0
    ip -n "$network" link set eth0 up
  done
else
  controller_address=127.0.0.1
  node_address="NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((base + 11))-$((base + 10 + nodes))]"
  echo "127.0.0.1 $controller" >> "$lab/etc/hosts"
  for i in $(seq "$nodes"); do echo "127.0.0.1 $prefix$i" >> "$lab/etc/hosts"; done
fi

# --- GPUs: clones of the null device; the digits at the end of the name become CUDA_VISIBLE_DEVICES
gres_types='' node_gres=''
if [ "$gpus" -gt 0 ]; then
  for g in $(seq 0 $((gpus - 1))); do
    mknod -m 666 "$lab/dev/fakegpu$g" c 1 3 || fail "mknod is forbidden here; set SLURM_LAB_GPUS=0 for nodes without GPUs"
    echo "Name=gpu Type=$gpu_type File=$lab/dev/fakegpu$g" >> "$lab/etc/gres.conf"
  done
  gres_types=GresTypes=gpu node_gres=Gres=gpu:$gpu_type:$gpus
fi
printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup CgroupAutomount=yes ConstrainDevices=no \
  ConstrainRAMSpace=no ConstrainCores=no > "$lab/etc/cgroup.conf"

# --- slurm.conf
if [ "$SLURM_LAB_ACCT" = dbd ]; then
  accounting="AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=$controller_address\n"
  accounting+="AccountingStoragePort=$((base + 2))\nAccountingStoragePass=$lab/run/munge.socket\n"
  accounting+="JobAcctGatherType=jobacct_gather/linux\nJobAcctGatherFrequency=5"
  [ "$gpus" -gt 0 ] && accounting+="\nAccountingStorageTRES=gres/gpu"
else
  accounting="AccountingStorageType=accounting_storage/none\nJobCompType=jobcomp/filetxt\nJobCompLoc=$lab/log/jobcomp.txt"
fi
sed -e "s#@LAB@#$lab#g; s#@CTL_HOST@#$controller#; s#@CTL_ADDR@#$controller_address#; s#@CTL_PORT@#$((base + 1))#" \
    -e "s#@NODE_PREFIX@#$prefix#; s#@NODES@#$nodes#; s#@NODE_ADDR@#$node_address#; s#@CPUS@#$SLURM_LAB_CPUS#g" \
    -e "s#@MEM@#$SLURM_LAB_MEM#; s#@GRES_TYPES@#$gres_types#; s#@NODE_GRES@#$node_gres#; s#@GRACE@#$SLURM_LAB_GRACE#" \
    -e "s#@KILL_WAIT@#$SLURM_LAB_KILL_WAIT#; s#@SLURMD_TIMEOUT@#$SLURM_LAB_SLURMD_TIMEOUT#" \
    -e "s#@PROCTRACK@#$SLURM_LAB_PROCTRACK#; s#@TASKPLUGIN@#$SLURM_LAB_TASKPLUGIN#; s#@CRED_EXPIRE@#$SLURM_LAB_CRED_EXPIRE#" \
    -e "s#@SCHED_EXTRA@#${SLURM_LAB_SCHED_EXTRA:+,$SLURM_LAB_SCHED_EXTRA}#; s#@ACCOUNTING@#$accounting#" \
    "$here/slurm.conf.in" > "$lab/etc/slurm.conf"
chmod 644 "$lab"/etc/*

# --- accounting: a database server on loopback, and slurmdbd, which looks for its configuration beside slurm.conf
start_accounting() {
  mkdir -p "$lab/db"
  mariadb-install-db --no-defaults --user=root --datadir="$lab/db" --auth-root-authentication-method=normal --skip-test-db \
    > "$lab/log/mariadb-install.log" 2>&1 || fail "no database was made; see $lab/log/mariadb-install.log"
  say "database made"
  # one statement per line: the server runs only the first statement of a line
  printf '%s\n' "CREATE USER IF NOT EXISTS 'slurm'@'%' IDENTIFIED BY 'slurm';" "GRANT ALL ON *.* TO 'slurm'@'%';" \
    "CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm';" "GRANT ALL ON *.* TO 'slurm'@'localhost';" > "$lab/etc/init.sql"
  # a session of its own, so that Ctrl-C in the caller's terminal does not reach it
  setsid mariadbd --no-defaults --user=root --datadir="$lab/db" --socket="$lab/run/mysql.socket" --pid-file="$lab/run/mariadbd.pid" \
     --bind-address=127.0.0.1 --port=$((base + 3)) --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 --skip-log-bin \
     --innodb-flush-log-at-trx-commit=0 --skip-name-resolve --init-file="$lab/etc/init.sql" > "$lab/log/mariadbd.log" 2>&1 < /dev/null &
  for _ in $(seq 1200); do [ -S "$lab/run/mysql.socket" ] && break; sleep 0.05; done
  [ -S "$lab/run/mysql.socket" ] || fail "mariadbd does not answer; see $lab/log/mariadbd.log"
  say "mariadbd is up"
  printf '%s\n' AuthType=auth/munge "AuthInfo=socket=$lab/run/munge.socket" "DbdHost=$controller" "DbdAddr=$controller_address" \
    "DbdPort=$((base + 2))" SlurmUser=root DebugLevel=verbose "LogFile=$lab/log/slurmdbd.log" "PidFile=$lab/run/slurmdbd.pid" \
    StorageType=accounting_storage/mysql StorageHost=127.0.0.1 "StoragePort=$((base + 3))" StorageUser=slurm StoragePass=slurm \
    StorageLoc=slurm_lab > "$lab/etc/slurmdbd.conf"
  chmod 600 "$lab/etc/slurmdbd.conf"   # slurmdbd refuses any other mode
  (cd "$lab/run" && slurmdbd -s) > "$lab/log/slurmdbd.out" 2>&1 < /dev/null || fail "slurmdbd: $(said "$lab/log/slurmdbd.out")"
  for _ in $(seq 1200); do answers "$controller_address" $((base + 2)) && break; sleep 0.05; done
  # slurmctld would die with "no TRES" without it
  answers "$controller_address" $((base + 2)) || fail "slurmdbd does not answer; see $lab/log/slurmdbd.log"
  timeout 20 sacctmgr -i add cluster lab > "$lab/log/sacctmgr.log" 2>&1 || fail "sacctmgr; see $lab/log/sacctmgr.log"
  say "slurmdbd is up and knows the cluster"
}
[ "$SLURM_LAB_ACCT" = dbd ] && start_accounting

# --- controller and nodes
slurmctld -c -i > "$lab/log/slurmctld.out" 2>&1 < /dev/null || fail "slurmctld: $(said "$lab/log/slurmctld.out")"
for i in $(seq "$nodes"); do
  mkdir -p "$lab/spool/$prefix$i"
  bash "$here/node.sh" up "$prefix$i" || fail "slurmd of $prefix$i: $(said "$lab/log/slurmd-$prefix$i.out")"
done
say "slurmctld and $nodes slurmd started"

deadline=$((SECONDS + 60))
while [ $SECONDS -lt $deadline ]; do
  kill -0 "$(cat "$lab/run/slurmctld.pid")" 2> /dev/null || fail "slurmctld has ended; see $lab/log/slurmctld.log"
  idle=$(timeout 5 sinfo -h -p low -t idle -o %D 2> /dev/null | awk '{ n += $1 } END { print n + 0 }')
  if [ "$idle" = "$nodes" ]; then say "all $nodes nodes are idle; use:  . $lab/env"; exit 0; fi
  sleep 0.1
done
timeout 5 sinfo -N -l >&2 || true
fail "the nodes did not become idle in 60 s; see $lab/log"
