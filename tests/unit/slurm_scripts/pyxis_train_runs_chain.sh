#!/bin/bash
#SBATCH --array=0-1%2
#SBATCH --chdir=/w/arrays/big/0001
#SBATCH --comment=/w/arrays/big/0001
#SBATCH --constraint='a&b'
#SBATCH --cpus-per-task=1
#SBATCH --dependency=aftercorr:41
#SBATCH --export=ALL
#SBATCH --gres=gpu:h100:1
#SBATCH --job-name=big.train
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=12800M
#SBATCH --no-requeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/w/arrays/big/0001/%a/logs/%A_%a.log
#SBATCH --signal=USR2@300
#SBATCH --time=60

# Slurm signals this shell when it ends the job by itself; the shell lives on to see how the step has ended.
told=''
trap 'told="$told TERM"' TERM
trap : USR1 USR2 CONT

# Which run, which start of which job. An array's element is ARRAY_TASK: a plain number may mean the array.
runs=(
  /w/runs/big-seed-1
  '/w/runs/it'"'"'s 2'
)
run="${runs[$SLURM_ARRAY_TASK_ID]}"
stage=train
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
job="${job:-$SLURM_JOB_ID}"
restart="${SLURM_RESTART_COUNT:-0}"
umask 022
echo "hpc-gen: $stage of $run, job $job, start $restart, on $SLURM_JOB_NODELIST, $(date +%FT%T%z)"

# What the processes find around them. Bytecode and caches stay off the shared file system.
module load cuda
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID SLURM_EXPORT_ENV HPC_GEN_TASK HPC_GEN_NUM_TASKS HPC_GEN_ATTEMPT HPC_GEN_RUNNER
export PYTHONPATH="${run}/code""${PYTHONPATH:+:$PYTHONPATH}"
export HPC_GEN_WORKSPACE=/w
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
cache="${TMPDIR:-/tmp}/hpc-gen-$(id -u)"
export PYTHONPYCACHEPREFIX="$cache/bytecode"
export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export NOTE='it'"'"'s five'
# When the time limit ends the job: Slurm's signals may be a minute early or late, so tasks watch the clock.
limit="${SLURM_JOB_END_TIME:-}"
if [ -z "$limit" ]; then
  limit=$(squeue -h -j "$job" -o %e 2> /dev/null)
  if [ -n "$limit" ]; then limit=$(date -d "$limit" +%s 2> /dev/null); fi
fi
export HPC_GEN_JOB_END="${limit:-0}"
export HPC_GEN_GRACE_S=30
export HPC_GEN_NO_NETWORK=1
export SUBMITIT_EXECUTOR=slurm

# The step. It runs in the background, because a shell looks at its traps only between two commands.
said=$(mktemp "${TMPDIR:-/tmp}/hpc-gen-srun.XXXXXX") || said=/dev/stderr
HPC_GEN_LAUNCHED=$(date +%s.%N)  # what the start costs is counted from here
export HPC_GEN_LAUNCHED
srun --unbuffered --kill-on-bad-exit=1 --export=ALL --open-mode=append --cpus-per-task=1 "--output=${run}/logs/%A_%a_%t.log" '--container-image=nvcr.io#nvidia/pytorch:25.06-py3' --container-mounts=/w:/w,/data:/data,/x:/y:ro python3 -I -S "${run}/code/slurm/hold_signals.py" python3 -P -u -m submitit.core._submit '/w/arrays/big/0001/slurm/submitted' 2> "$said" &
step=$!
wait "$step"
code=$?
while [ "$code" -gt 128 ] && kill -0 "$step" 2> /dev/null; do
  wait "$step"
  code=$?
done
# a signal may have ended the last wait just before the step ended: then its code is still to be had
wait "$step" 2> /dev/null
late=$?
if [ "$late" -ne 127 ]; then code=$late; fi
if [ -f "$said" ]; then cat "$said" >&2; fi

# What becomes of the job: slurm/requeue.py decides by the cause file, srun's code and Slurm's own words.
shown=$(scontrol show job -o "$job" 2>&1)
nodes=$(sinfo -h -N -n "$SLURM_JOB_NODELIST" -o "%N %T" 2> /dev/null)
decide() {
  printf "%s\n" "$shown" | "$@" -I "$run/code/slurm/requeue.py" --run "$run" --stage "$stage" \
    --job "$job" --restart "$restart" --code "$code" --told "$told" --srun "$said" \
    --nodes "$nodes" --limit 200 --stalled-limit 3 --retries 1 --chain-left 2
}
verdict=$(decide python3) || verdict=$(decide python3) || verdict=''
if [ -f "$said" ]; then rm -f "$said"; fi
read -r action final without <<< "$verdict"
if [ -z "$action" ]; then  # no Python here: the one rule that needs none
  final=$code action=end
fi
case "$action" in
  requeue | elsewhere)
    # until Slurm kills this shell; a controller that is being restarted is asked again
    for _ in $(seq 120); do
      if [ "$action" = elsewhere ]; then
        scontrol requeuehold "$job" && scontrol update "JobId=$job" "ExcNodeList=$without"
        scontrol release "$job" && break
      else
        scontrol requeue "$job" && break
      fi
      sleep 5
    done
    sleep 300 & wait $!
    ;;
esac
exit "${final:-$code}"
