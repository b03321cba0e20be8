# Turns the variables below into DISTRIBUTED_ARGS, the words between LAUNCHER and the training script. To be sourced from
# the repository's root. docs/launching.md has an example of each row.
#
#   one machine                          nothing
#   several, reached by ssh              HOSTFILE; started once
#   several, DeepSpeed without ssh       HOSTFILE, NODE_RANK, MASTER_ADDR; started on each
#   several, torchrun                    LAUNCHER=torchrun, NNODES, NODE_RANK, MASTER_ADDR; started on each
#   Slurm                                examples/slurm/train.sbatch sets the row above
#
#   LAUNCHER      deepspeed (default) or torchrun
#   NUM_GPUS      ranks on each machine (default: one for each visible GPU, or the slots of HOSTFILE)
#   HOSTFILE      one "HOST slots=N" a line
#   NNODES        number of machines for torchrun (default: 1)
#   NODE_RANK     which of them this is: 0, 1, ...
#   MASTER_ADDR   address of machine 0, as the others reach it
#   MASTER_PORT   free port of machine 0 (default: 29500)
#   NODE_ADDR     for torchrun: address of this machine, where the others cannot look up its host name
LAUNCHER=${LAUNCHER:-deepspeed}
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
if [ -z "${HOSTFILE:-}" ] && [ "${NODE_RANK:-0}" -ge "$NNODES" ]; then
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
    DISTRIBUTED_ARGS+=(--nproc_per_node "${NUM_GPUS:-gpu}")
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
