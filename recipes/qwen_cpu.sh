#!/usr/bin/env bash
# A PRM on a real Qwen2.5 without a GPU. The model solves GSM8K questions, a head on its frozen layers learns which of its
# solutions are right, then it chooses among samples of test questions, among programs, and looks for the first wrong steps
# of other models' solutions. docs/real-model.md has what it gave.
#
#   bash recipes/qwen_cpu.sh                                          # some four hours of one core, 4 GB
#   TRAIN=gsm8k/train.jsonl TEST=gsm8k/test.jsonl bash recipes/qwen_cpu.sh    # local files in place of the hub's
#   LABELS=hard bash recipes/qwen_cpu.sh                              # the paper's labels, by rollouts: hours more
#
# Restartable: what is done stays. The times are those of one core of a Xeon with AMX (bf16 matrix units).
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/qwen-cpu} PROCESSES=${PROCESSES:-1} DTYPE=${DTYPE:-bfloat16}
MODEL=${MODEL:-Qwen/Qwen2.5-Coder-0.5B-Instruct}
TASK=${TASK:-gsm8k} CODETASK=${CODETASK:-humaneval+} ERRORSET=${ERRORSET:-processbench}
TRAIN=${TRAIN:-} TEST=${TEST:-} CODE=${CODE:-} ERRORS=${ERRORS:-}
QUESTIONS=${QUESTIONS:-60} LABELS=${LABELS:-outcome} LIMIT=${LIMIT:-300} CODELIMIT=${CODELIMIT:-164} N=${N:-8} CODEN=${CODEN:-4} K=${K:-4}
EPOCHS=${EPOCHS:-10} LRHEAD=${LRHEAD:-3e-4} VALIDATION=${VALIDATION:-0.1}
TOKENS=${TOKENS:-360} CODETOKENS=${CODETOKENS:-640}
stages=5
. recipes/stages.sh
sampling=(--policy "$MODEL" --temperature 0.6 --dtype "$DTYPE")

# 8 solutions a question: 20 minutes. With LABELS=outcome a step is as right as the answer; with hard or soft, rollouts tell
run annotate ranks annotate.py --policies "$MODEL" --task "$TASK" ${TRAIN:+--task-data "$TRAIN"} --split train \
  --limit "$QUESTIONS" --samples "$N" --labels "$LABELS" --keep-unanimous --k "$K" --temperature 0.6 --max-solution-tokens "$TOKENS" --concurrent 50 \
  --dtype "$DTYPE" --out "$RUN/rows.jsonl" --resume --json "$RUN/annotate.json"
# the states of the frozen backbone are computed once: 7 minutes
run train ranks train.py --data "$RUN/rows.jsonl" --model "$MODEL" --freeze-backbone --lr-head "$LRHEAD" \
  --epochs "$EPOCHS" --accumulate 1 --val-fraction "$VALIDATION" --eval-every 20 --patience 0 --dtype "$DTYPE" --out "$RUN/prm" --resume
compare() {  # compare NAME TASK FILE LIMIT N TOKENS
  run "$1" ranks evaluate.py --task "$2" ${3:+--data "$3"} --prm "$RUN/prm" --limit "$4" --N "$5" "${sampling[@]}" \
    --max-solution-tokens "$6" --aggregate last --concurrent 50 --out "$RUN/$1" --json "$RUN/$1.json"
}
# two hours, one hour
compare math "$TASK" "$TEST" "$LIMIT" "$N" "$TOKENS"
compare code "$CODETASK" "$CODE" "$CODELIMIT" "$CODEN" "$CODETOKENS"
run first-error ranks evaluate.py --first-error "$ERRORSET" ${ERRORS:+--data "$ERRORS"} --prm "$RUN/prm" --threshold 0.5 \
  --dtype "$DTYPE" --out "$RUN/first-error" --json "$RUN/first-error.json"
tail -n 20 "$RUN"/{math,code,first-error}.log
