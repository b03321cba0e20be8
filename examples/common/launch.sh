# Turns the variables below into DISTRIBUTED_ARGS, the words between LAUNCHER and the training script, and has the function
# that starts them. To be sourced from the repository's root. docs/launching.md has an example of each row.
#
#   one machine                          nothing
#   several, reached by ssh              HOSTFILE; started once
#   several, DeepSpeed without ssh       HOSTFILE, NODE_RANK, MASTER_ADDR; started on each
#   several, torchrun                    NNODES, NODE_RANK, MASTER_ADDR; started on each
#   Slurm                                examples/slurm/train.sbatch sets the row above
#
#   LAUNCHER      torchrun (default), or deepspeed (default with a HOSTFILE)
#   NUM_GPUS      ranks on each machine (default: one for each visible GPU, or the slots of HOSTFILE)
#   HOSTFILE      one "HOST slots=N" a line
#   NNODES        number of machines for torchrun (default: 1), or MIN:MAX, which goes on while MIN are left
#   NODE_RANK     which of them this is: 0, 1, ...
#   MASTER_ADDR   address of machine 0, as the others reach it
#   MASTER_PORT   free port of machine 0 (default: 29500; one machine alone finds a free one)
#   NODE_ADDR     for torchrun: address of this machine, where the others cannot look up its host name
#   HAPLOVL_CODES file that receives the exit code, too (examples/slurm/train.sbatch reads it)
#   MAX_RESTARTS  how often torchrun starts the ranks again after a fault of a machine (default: 3)
if [ -n "${HOSTFILE:-}" ]; then
  LAUNCHER=${LAUNCHER:-deepspeed}
else
  LAUNCHER=${LAUNCHER:-torchrun}
fi
MASTER_PORT=${MASTER_PORT:-29500}
NNODES=${NNODES:-1}
DISTRIBUTED_ARGS=()

# Each of these would start something else than was asked for, without a word: most often every machine on its own.
if [ "$LAUNCHER" = deepspeed ] && [ "$NNODES" != 1 ]; then
  echo "NNODES=$NNODES is for LAUNCHER=torchrun; name the machines in a HOSTFILE, or set LAUNCHER=torchrun" >&2
  return 1
fi
if [ "$LAUNCHER" = torchrun ] && [ -n "${HOSTFILE:-}" ]; then
  echo "torchrun reads no HOSTFILE; unset it and set NNODES, NODE_RANK and MASTER_ADDR, or set LAUNCHER=deepspeed" >&2
  return 1
fi
if [ -n "${HOSTFILE:-}" ] && [ ! -f "$HOSTFILE" ]; then
  echo "HOSTFILE=$HOSTFILE is not a file (looked for from $PWD)" >&2
  return 1
fi
if [ -z "${HOSTFILE:-}" ] && [ "${NODE_RANK:-0}" -ge "${NNODES#*:}" ]; then
  echo "NODE_RANK=$NODE_RANK, but there is only NNODES=$NNODES; set NNODES (LAUNCHER=torchrun) or HOSTFILE" >&2
  return 1
fi

case $LAUNCHER in
  deepspeed)
    DISTRIBUTED_ARGS+=(--master_port "$MASTER_PORT")
    if [ -n "${NUM_GPUS:-}" ]; then
      DISTRIBUTED_ARGS+=(--num_gpus "$NUM_GPUS")
    fi
    if [ -n "${HOSTFILE:-}" ]; then
      DISTRIBUTED_ARGS+=(--hostfile "$HOSTFILE")
    fi
    if [ -n "${HOSTFILE:-}" ] && [ -n "${MASTER_ADDR:-}" ]; then
      DISTRIBUTED_ARGS+=(--master_addr "$MASTER_ADDR")
    fi
    if [ -n "${HOSTFILE:-}" ] && [ -n "${NODE_RANK:-}" ]; then
      : "${MASTER_ADDR:?address of machine 0, as the others reach it}"
      DISTRIBUTED_ARGS+=(--no_ssh --node_rank "$NODE_RANK")
    fi
    ;;
  torchrun)
    # The script below tells the ranks of all other signals; torchrun would give them 30 s to save.
    DISTRIBUTED_ARGS+=(
      --nproc_per_node "${NUM_GPUS:-gpu}"
      --max_restarts "${MAX_RESTARTS:-3}"
      --signals_to_handle SIGQUIT
    )
    if [ "$NNODES" = 1 ]; then
      DISTRIBUTED_ARGS+=(--standalone)
    else
      : "${NODE_RANK:?which of the $NNODES machines this is: 0, 1, ...}"
      : "${MASTER_ADDR:?address of machine 0, as the others reach it}"
      # Left to itself, torchrun compares MASTER_ADDR with its own names to find out which machine is to listen; where an
      # address has names that the machine does not know of, none does, and the launch fails.
      DISTRIBUTED_ARGS+=(
        --nnodes "$NNODES"
        --rdzv_backend c10d
        --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT"
        --rdzv_conf "is_host=$((NODE_RANK == 0))"
      )
      if [ -n "${NODE_ADDR:-}" ]; then
        DISTRIBUTED_ARGS+=(--local_addr "$NODE_ADDR")
      fi
    fi
    ;;
  *)
    echo "LAUNCHER=$LAUNCHER is neither deepspeed nor torchrun" >&2
    return 1
    ;;
esac

# shellcheck source=examples/common/remote_words.sh
source examples/common/remote_words.sh

# port_is_free PORT: whether this machine can listen there, as torch would: what only lingers after a run's end is free.
port_is_free() {
  python3 - "$1" <<'EOF'
import errno
import socket
import sys

with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("", int(sys.argv[1])))
    except OSError as error:
        sys.exit(error.errno == errno.EADDRINUSE)
EOF
}

# launch SCRIPT [FLAGS]: train to the end; returns the run's exit code, behind its last sentence (docs/launching.md).
#
# Ranks and this shell share a folder, HAPLOVL_LAUNCH_DIR. The launcher has a session of its own and ignores what it can, so
# that a signal, whoever gets it, reaches the ranks by one way: this shell writes its name into the folder.
launch() {
  # What DeepSpeed starts by ssh sees no folder of this machine: its codes and sentences come as DeepSpeed hands them on.
  if [ -n "${HOSTFILE:-}" ] && [ -z "${NODE_RANK:-}" ]; then
    remote_words "$HOSTFILE" "$@" || return 1
    exec "$LAUNCHER" "${DISTRIBUTED_ARGS[@]}" "${REMOTE_WORDS[@]}"
  fi
  # On one machine torchrun finds a free port by itself, and `deepspeed` is looked after by its ranks.
  if [ "$LAUNCHER" = torchrun ] && [ "$NNODES" != 1 ] && [ "$NODE_RANK" = 0 ] && ! port_is_free "$MASTER_PORT"; then
    echo "port $MASTER_PORT of $(hostname) is taken, most often by another run; give another one with MASTER_PORT=N" >&2
    if [ -n "${HAPLOVL_CODES:-}" ]; then
      echo 1 >>"$HAPLOVL_CODES"
    fi
    return 1
  fi
  local launcher status interrupted interrupts='' code sentence name
  HAPLOVL_LAUNCH_DIR=$(mktemp -d "${TMPDIR:-/tmp}/haplovl-launch.XXXXXX")
  export HAPLOVL_LAUNCH_DIR
  echo "$$" >"$HAPLOVL_LAUNCH_DIR/pid"
  for name in TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064
    trap "interrupted=1; echo SIG$name >>\"\$HAPLOVL_LAUNCH_DIR/leave\"" "$name"
  done
  # At the second one the ranks end without saving, at the third one nobody is asked.
  trap 'interrupted=1; echo SIGINT >>"$HAPLOVL_LAUNCH_DIR/leave"; interrupts+=x
    if [ "${#interrupts}" -ge 3 ]; then kill -KILL -- "-$launcher"; fi' INT
  (
    trap '' TERM HUP USR1 USR2
    exec setsid "$LAUNCHER" "${DISTRIBUTED_ARGS[@]}" "$@"
  ) &
  launcher=$!
  while :; do
    interrupted=
    status=0
    wait "$launcher" || status=$?
    [ -n "$interrupted" ] || break
  done
  # Nobody is left to tell, and the code must still be said.
  trap '' TERM HUP USR1 USR2 INT
  if [ -f "$HAPLOVL_LAUNCH_DIR/ending" ]; then
    { read -r code && sentence=$(cat); } <"$HAPLOVL_LAUNCH_DIR/ending"
    echo "$sentence" >&2
  elif [ -f "$HAPLOVL_LAUNCH_DIR/begun" ] && [ "$status" != 0 ]; then
    code=70
    echo "the ranks ended without a word (exit status $status of $LAUNCHER); the same command starts them again" >&2
  else
    code=$status
  fi
  rm -rf "$HAPLOVL_LAUNCH_DIR"
  if [ -n "${HAPLOVL_CODES:-}" ]; then
    echo "$code" >>"$HAPLOVL_CODES"
  fi
  return "$code"
}
