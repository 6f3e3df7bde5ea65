#!/usr/bin/env bash
# A PRM on a real Qwen2.5 without a GPU. The model solves GSM8K questions, rollouts of its own label the steps, a head is
# trained on its frozen layers; then the PRM chooses among samples of test questions, looks for the first wrong steps of
# other models' solutions, and chooses among programs. docs/real-model.md has what it gave.
#
#   bash recipes/qwen_cpu.sh                                          # 6 GB; the hours of each stage stand beside it
#   TRAIN=gsm8k/train.jsonl TEST=gsm8k/test.jsonl bash recipes/qwen_cpu.sh    # local files in place of the hub's
#   QUESTIONS=50 LIMIT=50 bash recipes/qwen_cpu.sh                    # wide intervals, in an eighth of the time
#
# Restartable: what is done stays. The hours are CPU hours of one core of an Intel Xeon with AMX (bf16 matrix units).
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/qwen-cpu} PROCESSES=${PROCESSES:-1} DTYPE=${DTYPE:-bfloat16}
MODEL=${MODEL:-Qwen/Qwen2.5-Coder-0.5B-Instruct}
TASK=${TASK:-gsm8k} CODETASK=${CODETASK:-humaneval+} ERRORSET=${ERRORSET:-processbench}
TRAIN=${TRAIN:-} TEST=${TEST:-} CODE=${CODE:-} ERRORS=${ERRORS:-}
QUESTIONS=${QUESTIONS:-300} LIMIT=${LIMIT:-300} CODELIMIT=${CODELIMIT:-164} N=${N:-8} CODEN=${CODEN:-4} K=${K:-4}
EPOCHS=${EPOCHS:-10} LRHEAD=${LRHEAD:-1e-3} VALIDATION=${VALIDATION:-0.1}
TOKENS=${TOKENS:-360} CODETOKENS=${CODETOKENS:-640}
stages=5
. recipes/stages.sh
sampling=(--policy "$MODEL" --temperature 0.6 --dtype "$DTYPE")

# 8 solutions a question; of those of questions that are solved sometimes, the first wrong step
run annotate ranks annotate.py --policies "$MODEL" --task "$TASK" ${TRAIN:+--task-data "$TRAIN"} --split train \
  --limit "$QUESTIONS" --samples "$N" --k "$K" --temperature 0.6 --max-solution-tokens "$TOKENS" --concurrent 50 \
  --dtype "$DTYPE" --out "$RUN/rows.jsonl" --resume --json "$RUN/annotate.json"
# the states of the frozen backbone are computed once
run train ranks train.py --data "$RUN/rows.jsonl" --model "$MODEL" --freeze-backbone --lr-head "$LRHEAD" \
  --epochs "$EPOCHS" --val-fraction "$VALIDATION" --eval-every 20 --dtype "$DTYPE" --out "$RUN/prm" --resume
compare() {  # compare NAME TASK FILE LIMIT N TOKENS
  run "$1" ranks evaluate.py --task "$2" ${3:+--data "$3"} --prm "$RUN/prm" --limit "$4" --N "$5" "${sampling[@]}" \
    --max-solution-tokens "$6" --aggregate last --concurrent 50 --out "$RUN/$1" --json "$RUN/$1.json"
}
compare math "$TASK" "$TEST" "$LIMIT" "$N" "$TOKENS"
compare code "$CODETASK" "$CODE" "$CODELIMIT" "$CODEN" "$CODETOKENS"
run first-error ranks evaluate.py --first-error "$ERRORSET" ${ERRORS:+--data "$ERRORS"} --prm "$RUN/prm" --threshold 0.5 \
  --dtype "$DTYPE" --out "$RUN/first-error" --json "$RUN/first-error.json"
tail -n 20 "$RUN"/{math,code,first-error}.log
