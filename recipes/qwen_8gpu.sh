#!/usr/bin/env bash
# The chain of qwen_1gpu.sh on eight GPUs: three LLMs vote, and the PRM's backbone is larger than one GPU can train.
#
#   bash recipes/qwen_8gpu.sh                                                # 14B PRM: 8 x 80 GB
#   BASE=Qwen/Qwen2.5-7B TRAINING=--checkpointing bash recipes/qwen_8gpu.sh  # 7B: DDP in place of FSDP, 8 x 140 GB
#   POLICY=http://localhost:8000/v1 REFERENCE=Qwen/Qwen2.5-7B-Instruct bash recipes/qwen_8gpu.sh
#
# More nodes: start the lines of qwen_1gpu.sh with torchrun's --nnodes and --rdzv-endpoint. A PRM of 72B trains that way
# on 32 GPUs (16 bytes a parameter, sharded), but to score it needs 144 GB on one GPU: these scripts do not split it.
set -euo pipefail
export RUN=${RUN:-runs/qwen8} PROCESSES=${PROCESSES:-8}
export POLICY=${POLICY:-Qwen/Qwen2.5-7B-Instruct} BASE=${BASE:-Qwen/Qwen2.5-14B}
export VOTERS=${VOTERS:-$POLICY Qwen/Qwen2.5-Math-7B-Instruct Qwen/Qwen2.5-3B-Instruct}
export PROBLEMS=${PROBLEMS:-7473} LIMIT=${LIMIT:-1319} N=${N:-16} TRAINING=${TRAINING:---fsdp --checkpointing}
# The keys and values of a tree of MCTS stay on the GPU until its problem is done: fewer problems at a time
export CONCURRENT=${CONCURRENT:-16}
export STRATEGIES=${STRATEGIES:-best_of_n majority beam mcts}
exec bash "$(dirname "$0")/qwen_1gpu.sh"
