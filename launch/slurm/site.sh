# What differs from site to site, in this one place. Sourced on every node, from the folder that holds launch/.
# (Account and partition: in the job scripts, or as options of sbatch.)

# module purge; module load python/3.11 cuda

if [ -f .venv/bin/activate ]; then
    . .venv/bin/activate
fi

# In a container: what to put before `accelerate launch`, such as (apptainer exec --nv aflora.sif)
container=()

# Multi-node GPU jobs: the network that ranks talk over, where it is not found by itself.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
