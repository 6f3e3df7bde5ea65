#!/usr/bin/env bash
# The chain with real Qwen2.5 models on one GPU (or, with fewer problems and patience, on a CPU): label GSM8K
# solutions, train a PRM on them, compare strategies on GSM8K and, for transfer, on HumanEval+.
#
#   bash recipes/qwen_1gpu.sh                                                  # 7B policy, 1.5B PRM, 80 GB
#   POLICY=Qwen/Qwen2.5-0.5B-Instruct BASE=Qwen/Qwen2.5-0.5B bash recipes/qwen_1gpu.sh           # 16 GB
#   POLICY=http://localhost:8000/v1 REFERENCE=Qwen/Qwen2.5-7B-Instruct bash recipes/qwen_1gpu.sh # sampled by vLLM
#
# Restartable. Every setting below can be set from outside; TRAIN, TEST, CODE and ERRORS are local files in place of
# the hub's. Estimates, not measurements, of memory and hours on one H100 stand beside each stage: docs/scale.md.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/qwen} PROCESSES=${PROCESSES:-1} DTYPE=${DTYPE:-bfloat16}
POLICY=${POLICY:-Qwen/Qwen2.5-7B-Instruct} BASE=${BASE:-Qwen/Qwen2.5-1.5B}
VOTERS=${VOTERS:-$POLICY} CODER=${CODER:-$POLICY} REFERENCE=${REFERENCE:-$POLICY}
TASK=${TASK:-gsm8k} CODETASK=${CODETASK:-humaneval+} ERRORSET=${ERRORSET:-processbench}
TRAIN=${TRAIN:-} TEST=${TEST:-} CODE=${CODE:-} ERRORS=${ERRORS:-}
PROBLEMS=${PROBLEMS:-2000} LIMIT=${LIMIT:-500} N=${N:-8} K=${K:-8} TOKENS=${TOKENS:-128} STEPS=${STEPS:-8}
EPOCHS=${EPOCHS:-2} VALIDATION=${VALIDATION:-0.1} LR=${LR:-1e-5} LRHEAD=${LRHEAD:-1e-4} BATCH=${BATCH:-16384}
TRAINING=${TRAINING---checkpointing} CODETOKENS=${CODETOKENS:-512} SIMILAR=${SIMILAR:-100} CONCURRENT=${CONCURRENT:-100}
STRATEGIES=${STRATEGIES:-best_of_n majority beam}
stages=6
. recipes/stages.sh
sampling=(--temperature 0.8 --dtype "$DTYPE")
limits=(--max-solution-tokens $((TOKENS * STEPS)))

# §2.1. 2,000 problems x 4 solutions, K rollouts for each prefix of the binary search. With --labels soft: the values
# c/k of all prefixes, for about three times as many rollouts
run annotate ranks annotate.py --policies $VOTERS --task "$TASK" ${TRAIN:+--task-data "$TRAIN"} --split train \
  --limit "$PROBLEMS" --samples 4 --k "$K" --concurrent "$CONCURRENT" "${sampling[@]}" \
  --max-solution-tokens $((TOKENS * STEPS)) --out "$RUN/rows.jsonl" --resume --json "$RUN/annotate.json"
# §2.2. fp32 weights and moments, 16 bytes a parameter; without --checkpointing faster and larger
run train ranks train.py --data "$RUN/rows.jsonl" --model "$BASE" --out "$RUN/prm" --epochs "$EPOCHS" --lr "$LR" \
  --lr-head "$LRHEAD" --val-fraction "$VALIDATION" --batch-tokens "$BATCH" --eval-every 20 --dtype "$DTYPE" \
  $TRAINING --resume
# §3.2: does it find the first wrong step of other models' solutions?
run first-error ranks evaluate.py --first-error "$ERRORSET" ${ERRORS:+--data "$ERRORS"} --limit 400 --prm "$RUN/prm" \
  --dtype "$DTYPE" --out "$RUN/first-error" --json "$RUN/first-error.json"
# §4.2 on math, and §4.3 on code: the PRM has seen none
compare() {  # compare NAME TASK FILE POLICY [flags]
  run "$1" ranks evaluate.py --task "$2" ${3:+--data "$3"} --policy "$4" --prm "$RUN/prm" --strategies $STRATEGIES \
    --N "$N" --limit "$LIMIT" --concurrent "$CONCURRENT" \
    "${sampling[@]}" "${limits[@]}" "${@:5}" --out "$RUN/$1" --json "$RUN/$1.json"
}
compare math "$TASK" "$TEST" "$POLICY"
compare code "$CODETASK" "$CODE" "$CODER" --max-solution-tokens $((CODETOKENS * 4))  # a program is one step
# Table 2, on the samples that best-of-N chose from
samples() { ls "$RUN/$1"/best_of_n-"$N"-*.jsonl; }
# --offload adds up vectors of the model's size in main memory, which takes all cores
THREADS=$((($(nproc --all) + PROCESSES - 1) / PROCESSES))
OMP_NUM_THREADS=${SIMILARTHREADS:-$THREADS} run similarity ranks similarity.py --sets "$(samples math)" "$(samples code)" \
  --model "$REFERENCE" --limit "$SIMILAR" --offload --dtype "$DTYPE" --json "$RUN/similarity.json"
tail -n 40 "$RUN"/{first-error,math,code,similarity}.log
