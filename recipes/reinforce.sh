#!/usr/bin/env bash
# Reward against truth in the tiny world: each form of credit, with some answers verified, and expert iteration; then
# search with a trained policy. In runs/reinforce (or $RUN): a folder for each run, the figure and the table of
# docs/reinforce.md. Stop it and start it again: what is done stays, and a run goes on from its last checkpoint.
#
#   bash recipes/reinforce.sh                          # seeds 0 1 2, 200 steps: hours on two cores
#   SEEDS=0 STEPS=40 bash recipes/reinforce.sh         # the first look
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/reinforce} PROCESSES=${PROCESSES:-1} SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-200} PROBLEMS=${PROBLEMS:-50} LIMIT=${LIMIT:-100}
FORMS=${FORMS:-outcome prm min verified advantage sum distil}
set -- $SEEDS
count=$(wc -w <<< "$FORMS")
stages=$((count * $# + 4))
. recipes/stages.sh
flags() {  # flags FORM: what makes the form
  case $1 in
    verified) echo --credit prm --verified 0.1 ;;
    distil) echo --distil beam ;;
    *) echo --credit "$1" ;;
  esac
}
for seed in $SEEDS; do  # all forms with one seed first: something to look at early
  for form in $FORMS; do
    run "$form-$seed" ranks -m beyond.reinforce $(flags "$form") --seed "$seed" --steps "$STEPS" --eval-every 20 \
      --val-problems "$PROBLEMS" --max-solution-tokens 192 --out "$RUN/$form-$seed" --resume
  done
done
run table $PYTHON -m beyond.hacking --runs "$RUN"/*-[0-9]/ --out "$RUN" --examples 3
# the loop, closed once: is the gain of search kept?
policy=$RUN/${FORMS%% *}-${SEEDS%% *}
for strategy in "beam" "best_of_n --choose weighted" "majority"; do
  run "search-${strategy%% *}" ranks search.py --strategy $strategy --n 16 --policy "$policy" --limit "$LIMIT" --seed 3
done
