#!/usr/bin/env bash
# The whole paper in miniature, on a laptop's CPU: annotate, train, search, evaluate, compare. From the shipped
# language models to every figure and table, in runs/tiny (or $RUN). Stop it and start it again: what is done stays.
#
#   bash recipes/tiny.sh                  # on two busy cores: label 19 minutes, train 78, figures and tables 29, but Figures 4 and 5 (not timed)
#   bash recipes/tiny.sh --fast           # fewer problems, samples and training runs, wider intervals: 6 minutes
#   bash recipes/tiny.sh --from-nothing   # makes the language models first (hours)
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/tiny} PROCESSES=${PROCESSES:-2} MODELS=tiny FAST=
for flag in "$@"; do
  case $flag in
    --fast) FAST=1 RUN=$RUN-fast ;;
    --from-nothing) MODELS=$RUN/models ;;
    *) echo "unknown flag $flag; there are --fast and --from-nothing" >&2; exit 2 ;;
  esac
done
# each may be set from outside: PROBLEMS=50 bash recipes/tiny.sh
if [ "$FAST" ]; then
  : "${PROBLEMS:=100}" "${LIMIT:=25}" "${SEEDS:=0}" "${RUNS:=0}" "${N:=8}" "${TOKENS:=1024}" "${EPOCHS:=2}" "${WIDTHS:=1x4 4x4}" "${SIMILAR:=12}"
else
  : "${PROBLEMS:=1000}" "${LIMIT:=200}" "${SEEDS:=0 1 2}" "${RUNS:=0 1 2}" "${N:=16}" "${TOKENS:=8192}" "${EPOCHS:=3}" "${WIDTHS:=1x2 1x4 2x4 4x4 8x8}" "${SIMILAR:=60}"
fi
set -- $RUNS
stages=$((14 + 10 * $#))
[ "$MODELS" = tiny ] || stages=$((stages + 1))
. recipes/stages.sh
train() {  # train NAME ROWS BACKBONE [flags]: one PRM for each seed of RUNS; 64 rows a step, whatever PROCESSES
  local name=$1 data=$2 backbone=$3 seed
  shift 3
  for seed in $RUNS; do
    run "train-$name-$seed" ranks train.py --data "$data" --model "$backbone" --out "$RUN/prm-$name-$seed" \
      --epochs "$EPOCHS" --lr 3e-4 --lr-head 2e-3 --accumulate $((PROCESSES < 4 ? 4 / PROCESSES : 1)) --val-fraction 0.1 --dtype float32 \
      --seed "$seed" --resume "$@"
  done
}
of() {  # of LABEL NAME: the PRMs of all runs under one label
  for seed in $RUNS; do echo "$1=$RUN/prm-$2-$seed"; done
}

[ "$MODELS" = tiny ] || run make $PYTHON tiny/make.py --out "$MODELS" --stages tokenizer A B C xs s m l
A=$MODELS/A B=$MODELS/B C=$MODELS/C

# §2.1: solutions of A, labelled by A, B and C; and the noise of those labels
run annotate ranks annotate.py --policies "$A" "$B" "$C" --limit "$PROBLEMS" --samples 4 --keep-unanimous \
  --out "$RUN/aslaf.jsonl" --resume --json "$RUN/annotate.json"
# their noise, and the label sets of Figure 3, all of one size: one LLM's labels, the consensus, the truth as a bound
run labels $PYTHON -m paper.label_noise --votes "$RUN/aslaf.jsonl.votes" --write "$RUN" --json "$RUN/labels.json"

# §2.2: PRMs of four sizes, of three label sets, of one domain each
for size in xs s m; do train $size "$RUN/rows-consensus.jsonl" "$MODELS/$size"; done
train l "$RUN/rows-consensus.jsonl" "$MODELS/l" --snapshots
RUNS=${RUNS%% *} train policy "$RUN/rows-consensus.jsonl" "$A" --snapshots  # has hardly seen corrections
for set in A B truth math code; do train "$set" "$RUN/rows-$set.jsonl" "$MODELS/l"; done
train mask "$RUN/rows-consensus.jsonl" "$MODELS/l" --mask-after-first-error  # judges each step by itself

# §4: the figures and tables
evaluate() {  # evaluate EXHIBIT flags
  local exhibit=$1
  shift
  run "$exhibit" ranks evaluate.py --exhibit "$exhibit" --policy "$A" --limit "$LIMIT" --seeds $SEEDS --N "$N" \
    --out "$RUN" "$@"
}
best=$RUN/prm-l-${RUNS%% *}
evaluate fig1 --prms $(of xs xs) $(of s s) $(of m m) $(of l l)
# a PRM for each evaluation of the training: fewer problems
evaluate fig2 --prms l="$best" A="$RUN/prm-policy-${RUNS%% *}" --limit "$((LIMIT / 4))"
evaluate fig3 --prms $(of ASLAF l) $(of LLM-A A) $(of LLM-B B) $(of truth truth) $(of masked mask)
# four views of the same searches, and the router on problems that it was not measured on
for exhibit in fig4 fig5 difficulty router; do evaluate $exhibit --prm "$best" --tokens "$TOKENS" --widths $WIDTHS; done
cp "$RUN/router.json" "$best"
mkdir -p "$RUN/aside"
run routed ranks evaluate.py --exhibit fig4 --policy "$A" --prm "$best" --tokens "$TOKENS" --widths $WIDTHS --limit "$LIMIT" \
  --seeds 100 --out "$RUN/aside"
evaluate fig6 --prms consensus="$best" truth="$RUN/prm-truth-${RUNS%% *}" masked="$RUN/prm-mask-${RUNS%% *}"
evaluate table1 --task tiny-code --policies A="$A" B="$B" C="$C" --prms $(of Code code) $(of Math math) $(of both l)
run similarity ranks similarity.py --policy "$A" --prm "$best" --limit "$SIMILAR" --json "$RUN/similarity.json"
echo "all done in $(((SECONDS - started) / 60)) min: figures and tables are in $RUN"
