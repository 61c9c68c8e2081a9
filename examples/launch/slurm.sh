#!/usr/bin/env bash
# Trains the example on several nodes of a Slurm cluster, one process a node:
#
#   sbatch --nodes=4 examples/launch/slurm.sh --output /shared/runs/moe_lm --steps 8000
#
# from the repository's folder, which all nodes must see, as they must see --output. Options after the
# script's name go to examples/train_moe_lm.py. Environment: RANKS, devices a node (default 4); PYTHON
# (default .venv/bin/python). Two minutes before the time limit Slurm sends SIGTERM, and the run saves
# and stops; submit it again to go on.
#SBATCH --job-name=moe_lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# Where a task fails, the others have a minute to say which one before Slurm ends them.
exec srun --kill-on-bad-exit=0 --wait=60 --label \
  "${PYTHON:-.venv/bin/python}" examples/train_moe_lm.py \
  --distributed --topology "${SLURM_NNODES:?run this with sbatch}x${RANKS:-4}" --max-minutes 0 "$@"
