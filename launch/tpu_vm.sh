#!/usr/bin/env bash
# Runs jaxvision.main on every host of a Cloud TPU VM or pod slice.
#
#   TPU=my-tpu ZONE=us-central2-b launch/tpu_vm.sh --config=configs/igq_vit.py --workdir=/mnt/share/runs/igq
#
# A pod slice needs the same program on all of its hosts, which "--worker=all" starts; jax.distributed finds the
# hosts by itself. Start this inside tmux, so that it outlives your connection. To stop a run, don't end this script
# but run STOP=1 launch/tpu_vm.sh elsewhere: the programs save and end, and the same command continues the run.
#
# Environment:
#   TPU      name of the TPU VM
#   ZONE     its zone
#   PROJECT  its project [gcloud's]
#   FOLDER   the checkout of jaxvision on every host [jaxvision]
#   PYTHON   the interpreter on every host [python3]
#   STOP     1: send SIGTERM to the programs that this script started last, instead of starting one
#
# Exit code: gcloud's, which is not 0 where a program's is not 0.

set -euo pipefail

PYTHON="${PYTHON:-python3}"
FOLDER="${FOLDER:-jaxvision}"

for name in TPU ZONE; do
  if [[ -z "${!name:-}" ]]; then
    echo "tpu_vm.sh: set $name, the $([[ $name == TPU ]] && echo name || echo zone) of the TPU VM" >&2
    exit 64
  fi
done
if ! command -v gcloud >/dev/null; then
  echo "tpu_vm.sh: there is no gcloud; install the Google Cloud CLI" >&2
  exit 64
fi

on_all_hosts() {
  local project=()
  if [[ -n "${PROJECT:-}" ]]; then project=(--project="$PROJECT"); fi
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" ${project[@]+"${project[@]}"} --worker=all --command="$1"
}

# Quoted, so that each host's shell gives jaxvision.main the same arguments as this one has.
printf -v folder '%q' "$FOLDER"
arguments=""
if (($# > 0)); then printf -v arguments ' %q' "$@"; fi

if [[ "${STOP:-0}" == 1 ]]; then
  # The number in the file may belong to another program by now, so its command line is looked at first.
  # shellcheck disable=SC2016 # expanded on the hosts
  on_all_hosts "cd $folder"' && pid=$(cat .jaxvision.pid) && grep -qa jaxvision.main "/proc/$pid/cmdline" &&
    kill -TERM "$pid" || echo "$(hostname): nothing runs"'
  exit 0
fi

on_all_hosts "cd $folder && echo \$\$ >.jaxvision.pid && exec $PYTHON -m jaxvision.main --multihost$arguments"
