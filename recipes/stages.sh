# Sourced by the recipes: stages that report their minutes and are skipped once they are done. Needs RUN and stages.
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}  # s after a SIGTERM; torchrun gives 30
mkdir -p "$RUN"
started=$SECONDS stage=0

# run NAME command ...: its output goes to RUN/NAME.log; RUN/NAME.done says that it need not run again.
run() {
  local name=$1 begun=$SECONDS
  shift
  stage=$((stage + 1))
  if [ -e "$RUN/$name.done" ]; then echo "[$stage/$stages] $name: done already"; return; fi
  echo "[$stage/$stages] $name: $*"
  "$@" > "$RUN/$name.log" 2>&1 || { tail -n 20 "$RUN/$name.log" >&2; echo "stopped in $name; see $RUN/$name.log" >&2; exit 1; }
  local left
  for left in "$RUN"/*/checkpoint-*; do  # of this stage's --out, not of another one's
    if [[ -e $left && " $* " == *" --out ${left%/*} "* ]]; then echo "$name was told to stop: start this again" >&2; exit 1; fi
  done
  touch "$RUN/$name.done"
  local spent=$((SECONDS - started))
  echo "[$stage/$stages] $name took $((SECONDS - begun)) s; $((spent / 60)) min so far, about" \
       "$((spent * (stages - stage) / stage / 60)) min left if the other stages are like these"
}
ranks() {
  if [ "$PROCESSES" = 1 ]; then $PYTHON "$@"; else $PYTHON -m torch.distributed.run --standalone --nproc_per_node="$PROCESSES" "$@"; fi
}
