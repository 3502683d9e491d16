# shellcheck shell=bash
# Sourced by start.sh, stop.sh and node.sh. Every value can be set beforehand; the defaults make one lab of four nodes.
: "${SLURM_LAB_DIR:=${TMPDIR:-/tmp}/slurm-lab-$(id -u)}"
# stop.sh and node.sh follow the settings with which the lab was started (only from a file of our own: /tmp is open to all)
if [ -z "${lab_is_new:-}" ] && [ -O "$SLURM_LAB_DIR/env" ]; then . "$SLURM_LAB_DIR/env"; fi
: "${SLURM_LAB_PORT_BASE:=17000}"    # ports +1 slurmctld, +2 slurmdbd, +3 mariadbd, +11... one per slurmd
: "${SLURM_LAB_NODES:=4}"            # number of nodes
: "${SLURM_LAB_PREFIX:=labn}"        # labn1, labn2, ...; two labs side by side need different ones (control groups)
: "${SLURM_LAB_CPUS:=16}"            # claimed CPUs per node (config_overrides)
: "${SLURM_LAB_MEM:=64000}"          # claimed memory per node, MiB
: "${SLURM_LAB_GPUS:=4}"             # claimed GPUs per node: clones of the null device; 0 = none
: "${SLURM_LAB_GPU_TYPE:=a100}"
: "${SLURM_LAB_NET:=loopback}"       # loopback: one address, a port per node; veth: a network namespace and an address per node
: "${SLURM_LAB_SUBNET:=10.207.13}"   # of veth mode
if [ -z "${SLURM_LAB_ACCT:-}" ]; then   # dbd: sacct works (needs slurmdbd and mariadb-server); none: no sacct
  if command -v slurmdbd >/dev/null && command -v mariadbd >/dev/null; then SLURM_LAB_ACCT=dbd; else SLURM_LAB_ACCT=none; fi
fi
if [ -z "${SLURM_LAB_PROCTRACK:-}" ]; then   # cgroup kills what a job leaves behind; linuxproc does not
  if [ -w /sys/fs/cgroup/freezer/tasks ]; then SLURM_LAB_PROCTRACK=proctrack/cgroup; else SLURM_LAB_PROCTRACK=proctrack/linuxproc; fi
fi
: "${SLURM_LAB_TASKPLUGIN:=task/none}"
: "${SLURM_LAB_GRACE:=10}"           # GraceTime of partition low, s
: "${SLURM_LAB_KILL_WAIT:=5}"        # KillWait, s
: "${SLURM_LAB_SLURMD_TIMEOUT:=10}"  # SlurmdTimeout, s
: "${SLURM_LAB_CRED_EXPIRE:=5}"      # s; also the wait of a requeued job; below 5 Slurm waits 120 s
: "${SLURM_LAB_SCHED_EXTRA:=}"       # more SchedulerParameters, for instance preempt_send_user_signal
export SLURM_CONF="$SLURM_LAB_DIR/etc/slurm.conf"
