#!/bin/bash
# run_clm.py on all GPUs of a SLURM allocation; the arguments of this script are those of run_clm.py:
#   sbatch docs/launch/slurm.sh --optim mars_adamw --learning_rate 3e-3 --output_dir out …
# CONFIG names another file of this folder, GPUS the GPUs of a node. Submit it from the folder that holds run_clm.py.
#SBATCH --job-name=mars
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

CONFIG=${CONFIG:-docs/launch/ddp_2x8.yaml}
GPUS=${GPUS:-8}
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / GPUS))

# One launcher a node. SLURM_NODEID differs between them, so it is the inner shell that reads it; that a node fails ends
# the job, instead of leaving the others to wait.
srun --kill-on-bad-exit=1 bash -c '
    config=$1 processes=$2 address=$3; shift 3
    exec accelerate launch --config_file "$config" --num_machines "$SLURM_NNODES" --num_processes "$processes" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$address" --main_process_port 29500 run_clm.py "$@"
' launch "$CONFIG" $((SLURM_NNODES * GPUS)) "${HOSTS%%$'\n'*}" "$@"
