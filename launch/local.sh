#!/usr/bin/env bash
# Runs jaxvision.main on one machine.
#
#   launch/local.sh --config=configs/igq_vit.py --workdir=runs/igq            one process, all local devices
#   NPROC=2 launch/local.sh --config=configs/igq_vit.py --workdir=runs/igq    two processes over loopback
#
# Several processes share the machine as several hosts would: each sees its part of the GPUs (or the CPU), and
# they find each other at 127.0.0.1. One process is the faster choice for real work on one machine.
#
# Environment:
#   NPROC    number of processes [1]
#   PORT     port of the coordinator [a free one]
#   GRACE    seconds from a failure or a signal until the processes that are left are killed [120]
#   PYTHON   the interpreter [python]
#
# Exit code: that of jaxvision.main; with several processes, of the first that failed.

set -euo pipefail

NPROC="${NPROC:-1}"
GRACE="${GRACE:-120}"
PYTHON="${PYTHON:-python}"

if [[ ! "$NPROC" =~ ^[1-9][0-9]*$ ]]; then
  echo "local.sh: NPROC=$NPROC is no number of processes" >&2
  exit 64
fi
if ! command -v "$PYTHON" >/dev/null; then
  echo "local.sh: there is no $PYTHON; activate the environment or set PYTHON" >&2
  exit 64
fi
if ((NPROC == 1)); then
  exec "$PYTHON" -m jaxvision.main "$@"
fi

free_port() {
  "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# The GPUs of process $1, as CUDA_VISIBLE_DEVICES; empty output where there are none to share out.
gpus_of() {
  local process=$1 each i ids=()
  if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    IFS=, read -r -a ids <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    while read -r i; do ids+=("$i"); done < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  fi
  each=$((${#ids[@]} / NPROC))
  for ((i = process * each; i < (process + 1) * each; i++)); do
    printf '%s,' "${ids[i]}"
  done
}

PORT="${PORT:-$(free_port)}"
pids=()

start() {
  local process=$1 gpus
  shift
  gpus="$(gpus_of "$process")"
  if [[ -n "$gpus" ]]; then
    export CUDA_VISIBLE_DEVICES="${gpus%,}"
  fi
  exec "$PYTHON" -m jaxvision.main "$@" \
    --coordinator="127.0.0.1:$PORT" --num_processes="$NPROC" --process_id="$process"
}

deadline=0
signal_all() {
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" -- "-$pid" 2>/dev/null || true
  done
}
# shellcheck disable=SC2329 # called by the trap below
hand_on() {
  signal_all TERM
  deadline=$((SECONDS + GRACE))
}
trap hand_on INT TERM HUP

# Job control gives each process its own group: Ctrl-C then reaches this script alone, which hands it on once.
# (A second signal means "stop without saving", so the processes must not get the first one twice.)
set -m
for ((process = 0; process < NPROC; process++)); do
  (start "$process" "$@") </dev/null &
  pids+=("$!")
done
set +m

# Polled, because macOS's bash 3.2 has no "wait -n".
code=0
left="$NPROC"
finished=()
for ((process = 0; process < NPROC; process++)); do finished+=(0); done
while ((left > 0)); do
  for ((process = 0; process < NPROC; process++)); do
    if ((finished[process])) || kill -0 "${pids[process]}" 2>/dev/null; then
      continue
    fi
    status=0
    wait "${pids[process]}" || status=$?
    finished[process]=1
    left=$((left - 1))
    if ((status != 0 && code == 0)); then
      code=$status
      if ((left > 0)); then
        echo "local.sh: process $process ended with exit code $status; the others have $GRACE seconds to end" >&2
        # 75 is a save at a signal: the others are saving too, and a second signal would cut that short.
        if ((status != 75 && deadline == 0)); then signal_all TERM; fi
        if ((deadline == 0)); then deadline=$((SECONDS + GRACE)); fi
      fi
    fi
  done
  if ((left > 0)); then
    if ((deadline > 0 && SECONDS >= deadline)); then signal_all KILL; fi
    sleep 0.3 || true
  fi
done
exit "$code"
