# One node's share of a job: started by job.sh through srun, once per node. Its arguments are what the launcher starts:
# `-m aflora_dist.training.run ...`, or a script of your own.
trap '' USR1 # `scancel --signal=USR1` reaches the launcher too, which would die of it; the ranks take it as a stop request
arguments=("$@")
set -- # a script that is sourced without arguments, as conda's activate, would take these for its own
. launch/slurm/site.sh
exec "${container[@]}" accelerate launch --config_file "$AFLORA_LAUNCH" \
    --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((SLURM_JOB_NUM_NODES * AFLORA_PROCESSES_PER_NODE))" \
    --main_process_ip "$AFLORA_MAIN_ADDRESS" --main_process_port "$AFLORA_MAIN_PORT" \
    --mixed_precision "${AFLORA_PRECISION:-no}" --deepspeed_multinode_launcher standard --rdzv_backend static "${arguments[@]}"
