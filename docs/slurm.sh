#!/bin/bash
# ViT-L/16 by the paper's recipe under SLURM. From the folder that the paths below are relative to:
#
#   sbatch docs/slurm.sh                                    1 machine x 4 GPUs
#   sbatch --nodes=2 --gpus-per-node=2 docs/slurm.sh        2 machines x 2 GPUs, the same run
#   OUT=runs/vit_l16-14400 sbatch --nodes=2 docs/slurm.sh --set batch_size=14400
#                                                           2 machines x 4 GPUs: eight groups of 1,800, another run
#
# What stands behind docs/slurm.sh goes to `micl-zoo train`. Add the account and the partition of your cluster, and
# what makes `micl-zoo` a command on its machines. Tried with stand-ins for srun and scontrol, on no cluster.

#SBATCH --job-name=vit_l16
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append         # a job that comes back goes on writing the same log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1        # one task a machine; it starts a process for each GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=64         # as many cores as the machine has for these GPUs
#SBATCH --time=24:00:00
#SBATCH --requeue                  # after a pre-emption or a machine that failed, SLURM starts the job again
# 120 s before the time is up, SIGTERM goes to what srun started, not to this script ("B:" would be the script alone).
# There it is micl-zoo that gets it. It passes it on to the GPUs' processes and gives them 30 s for a checkpoint.
#SBATCH --signal=TERM@120

set -u
recipe=${RECIPE:-vit_l16.in1k}
data=${DATA:-/data/imagenet/train}
out=${OUT:-runs/vit_l16}           # on a file system that all the machines see

gpus=${SLURM_GPUS_PER_NODE##*:}    # "4", or "a100:4"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MICL_ZOO_SECRET=${MICL_ZOO_SECRET:-$(head -c 16 /dev/urandom | od -An -tx1 | tr -d " \n")}  # by which the machines of this job know each other
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it from sbatch by itself

# No wrapper between srun and micl-zoo: it would get the signal in its place.
srun micl-zoo train "$recipe" --data "$data" --out "$out" \
  --gpus "$gpus" --nodes "$SLURM_JOB_NUM_NODES" --rdzv "$first:29500" \
  --workers "$((SLURM_CPUS_PER_TASK / gpus - 1))" "$@"
code=$?

# 143 is 128 + SIGTERM: stopped in time. The job goes back into the queue and later on from the checkpoint.
# After scancel this line is not reached: SLURM ends this script, too.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
