#!/usr/bin/env bash
# Trains on every worker of a Cloud TPU slice that already exists. Run it where gcloud is logged in:
#
#   export TPU_NAME=my-slice ZONE=europe-west4-a REPOSITORY=URL REVISION=COMMIT
#   export WORKDIR=/mnt/shared/runs/cifar10 DATA_DIR=/mnt/shared/tensorflow_datasets FLAGFILE=experiments/cifar10.flags
#   experiments/launch/tpu_pod.sh install   # once for each slice: the clone at REVISION, and its packages
#   experiments/launch/tpu_pod.sh train     # starts one process a worker, then returns
#   experiments/launch/tpu_pod.sh log       # the last lines of each worker; the very last says how it ended, if it has
#   experiments/launch/tpu_pod.sh stop      # SIGTERM: every process takes part in one last checkpoint, then exits
#
# It creates and deletes nothing in the cloud: no TPU, no disk, no bucket. On each worker it owns one folder,
# $HOME/ddpm_jax: the clone, its .venv, train.log and train.pid. On Cloud TPU, JAX finds the other workers by itself.
#
# Must be equal on every host:
#   - the command and its flags, and the code: both come from this script, the code at REVISION;
#   - the package versions: `install` runs the same locked installation on all workers;
#   - the data set: prepared under DATA_DIR, on storage that all workers share, or the same copy on each of them;
#   - the workdir: one folder on storage that all workers share, mounted at the same path (NFS, for example). Every
#     process writes its part of a checkpoint there, process 0 everything else; a worker's own disk will not do.
#
# To resume after a stop, a failure or a pre-emption: the same `train`. It goes on at the last checkpoint, on this slice
# or on one of another size. `log` tells them apart: its last line is `exit code 0: finished`, `exit code 75: stopped
# before it was finished` (--stop_exit_code), or another code, of a failure.
set -euo pipefail

: "${TPU_NAME:?name the TPU slice}"
: "${ZONE:?name the zone of the slice}"

on_every_worker() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

# The number in the file may be that of any process once the machine was started anew.
# shellcheck disable=SC2016  # for the shell of the worker
IS_TRAINING='is_training() { ps -o args= -p "$(cat train.pid 2>/dev/null)" 2>/dev/null | grep -q ddpm_jax.main; }'

case "${1:-}" in
  install)
    : "${REPOSITORY:?name the git URL to clone}"
    : "${REVISION:?name the commit to check out}"
    : "${PYTHON:=python3}" # 3.11 or newer: where the TPU image's own is older, install one and name it here
    # The lock holds the tested versions; [tpu] adds libtpu for the JAX that is then installed.
    on_every_worker "$(printf 'set -e
      test -d ~/ddpm_jax/.git || git clone %q ~/ddpm_jax
      cd ~/ddpm_jax && git fetch origin && git checkout --detach %q
      %q -m venv .venv
      .venv/bin/pip install --require-hashes -r requirements.lock
      .venv/bin/pip freeze >.venv/installed.txt
      .venv/bin/pip install -c .venv/installed.txt -e ".[tpu]"' "$REPOSITORY" "$REVISION" "$PYTHON")"
    ;;
  train)
    : "${WORKDIR:?name the folder of this run, on storage that all workers share}"
    : "${DATA_DIR:?name the folder of the prepared TFDS data sets}"
    : "${FLAGFILE:?name the experiment, such as experiments/cifar10.flags}"
    on_every_worker "$(printf 'cd ~/ddpm_jax && test -x .venv/bin/python || { echo "not installed" >&2; exit 1; }
      '"$IS_TRAINING"'
      if is_training; then echo "already training" >&2; exit 1; fi
      (
        trap "" HUP # the connection ends before the training
        .venv/bin/python -m ddpm_jax.main --flagfile=%q --workdir=%q --data_dir=%q --stop_exit_code=75 &
        echo $! >train.pid
        wait $!
        code=$?
        rm -f train.pid
        case $code in
          0) echo "exit code 0: finished" ;;
          75) echo "exit code 75: stopped before it was finished; train resumes it" ;;
          *) echo "exit code $code: failed" ;;
        esac
      ) >>train.log 2>&1 </dev/null &' "$FLAGFILE" "$WORKDIR" "$DATA_DIR")"
    ;;
  log) on_every_worker 'tail -n 5 ~/ddpm_jax/train.log' ;;
  stop)
    on_every_worker "cd ~/ddpm_jax || exit 1
      $IS_TRAINING
      if is_training; then kill -TERM \"\$(cat train.pid)\"; else echo 'not training' >&2; fi"
    ;;
  *)
    echo "usage: $0 install|train|log|stop" >&2
    exit 2
    ;;
esac
