#!/usr/bin/env bash
# What only a GPU can show, without a download, in at most ten minutes: tests, search, training and
# its resume, DDP, FSDP, the tree cache, speed and memory. Prints a table to paste into an issue.
#
#   bash recipes/gpu_check.sh                  # all GPUs that there are; OUT=runs/gpu_check
#   bash recipes/gpu_check.sh --only decode    # some of the stages
#   bash recipes/gpu_check.sh --device cpu     # the same stages in tiny sizes: are they in order?
#
# OUT/STAGE.log has what each stage printed, OUT/table.md the table. Exit status 1: a stage failed.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
exec ${PYTHON:-python} benchmarks/gpu.py --out "${OUT:-runs/gpu_check}" "$@"
