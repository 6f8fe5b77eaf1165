# What the job scripts have in common: one accelerate launch per node, and coming back after a preemption.
# Sourced with the options of `aflora train` as arguments, or with a script of your own (FILE.py, or -m MODULE) and its
# arguments. What they write must lie on a file system that all nodes see.
#
# Preemption and time limit: Slurm sends USR1 to this shell ahead of the end. Launchers do not pass signals on, so
# the request goes by a file; all ranks save after the same update and leave; this shell puts the job back into the
# queue, and the next start goes on with --resume. A node that fails puts the job back by itself (--requeue).
# Ranks that have not left after AFLORA_GRACE seconds (until 20 s before the time limit, at least 100) are ended, and the
# job goes back into the queue all the same.
# A script of your own gets USR1 in every rank, which ignores it unless the script handles it, and AFLORA_GRACE seconds
# (60); then the job goes back into the queue. The script has to go on from its last checkpoint by itself.

if ! [[ ${AFLORA_PROCESSES_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]]; then
    echo "aflora: AFLORA_PROCESSES_PER_NODE=$AFLORA_PROCESSES_PER_NODE is no number of ranks. For 0 from Slurm the job has" \
        "no GPU: ask for one (--gpus-per-node=1), or submit launch/slurm/cpu.sbatch" >&2
    exit 2
fi

target=(-m aflora_dist.training.run)
own=
case ${1:-} in
-m) own=1 target=(-m "${2:?-m needs a module}"); shift 2 ;;
*.py)
    [ -f "$1" ] || { echo "aflora: there is no script $1 below $PWD" >&2; exit 2; }
    own=1 target=("$1"); shift ;;
esac

run_dir=runs/aflora
arguments=()
if [ -n "$own" ]; then
    arguments=("$@")
    set --
fi
while (($#)); do
    case $1 in
    --run.dir) run_dir=${2:?--run.dir needs a folder}; shift ;;
    --run.dir=*) run_dir=${1#*=}; : "${run_dir:?--run.dir needs a folder}" ;;
    --config | --config=* | *.yaml | *.yml)
        echo "aflora: give the run's directory with --run.dir; one in a configuration file is not seen here" >&2
        arguments+=("$1") ;;
    --resume* | --run.resume*)
        echo "aflora: a job always goes on from the last checkpoint in its run's directory: leave $1 away" >&2
        exit 2 ;;
    *) arguments+=("$1") ;;
    esac
    shift
done

# Job arrays: one element per preset and seed.
#   AFLORA_SEEDS="0 1 2" AFLORA_PRESETS="glue/cola glue/rte" sbatch --array=0-5 launch/slurm/gpu.sbatch --run.dir runs/table
# A script of your own finds its seed where its arguments say {seed}.
#   AFLORA_SEEDS="0 1 2" sbatch --array=0-2 launch/slurm/gpu.sbatch train.py --seed {seed} --out runs/mine/seed_{seed}
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    for table in AFLORA_SEEDS AFLORA_PRESETS; do
        if [[ ${!table:-} == *,* ]]; then
            echo "aflora: $table=${!table}: put spaces between them, not commas" >&2
            exit 2
        fi
    done
    read -d '' -ra seeds <<<"${AFLORA_SEEDS:-}"
    read -d '' -ra presets <<<"${AFLORA_PRESETS:-}"
    given=${#seeds[@]}
    # Without seeds an element of one preset, or of none, is a seed; of several presets each has the same.
    ((given)) || seeds=("$SLURM_ARRAY_TASK_ID")
    [ -n "$own" ] || ((given || ${#presets[@]} < 2)) || seeds=(0)
    elements=$((${#seeds[@]} * (${#presets[@]} && ! 0$own ? ${#presets[@]} : 1)))
    if ((given || elements > 1)); then
        if ((SLURM_ARRAY_TASK_ID >= elements)); then
            echo "aflora: the seeds and presets have no element $SLURM_ARRAY_TASK_ID: --array=0-$((elements - 1))" >&2
            exit 2
        fi
    fi
    seed=${seeds[SLURM_ARRAY_TASK_ID % ${#seeds[@]}]}
    if [ -n "$own" ]; then
        arguments=("${arguments[@]//\{seed\}/$seed}")
    else
        arguments+=(--train.seed "$seed")
        if ((${#presets[@]})); then
            preset=${presets[SLURM_ARRAY_TASK_ID / ${#seeds[@]} % ${#presets[@]}]}
            arguments+=(--preset "$preset")
            run_dir=$run_dir/${preset//\//_}
        fi
        run_dir=$run_dir/seed_$seed
    fi
elif [[ -n $own && "${arguments[*]}" == *{seed}* ]]; then
    echo "aflora: {seed} stands for the seed of an element of a job array: sbatch --array=0-2 ..." >&2
    exit 2
fi

asked= patience= left=
# tell: whom; finished: whether all is done. Who has not left by then is ended, and comes back all the same.
ask() {
    [ -z "$asked" ] || return
    asked=1
    tell
    # A limit that is hours away is not why the signal came: the job is preempted, and nobody says how soon it ends.
    [ -z "$left" ] || { left=$((left - $(date +%s))); ((left <= grace || left > 3600)) || grace=$left; }
    (sleep "${AFLORA_GRACE:-$grace}" >/dev/null 2>&1 && ! finished && scontrol requeue "$job") &
    patience=$!
}
if [ -n "$own" ]; then
    what="${target[*]}"
    grace=60
    # $job: in an array SLURM_JOB_ID of one of the elements is the number of all of them.
    tell() { scancel --signal=USR1 "$job"; }
    finished() { false; }
else
    what=$run_dir
    arguments+=(--run.dir "$run_dir" --resume)
    mkdir -p "$run_dir"
    rm -f "$run_dir/stop" # meant for an earlier start
    export AFLORA_STOP_CLEARED=1 # one that is there from here on is meant for this start, however early it comes
    # Ranks look between updates: one may be in a long evaluation, or still loading. Until shortly before the end.
    grace=100
    [ -z "${SLURM_JOB_END_TIME:-}" ] || left=$((SLURM_JOB_END_TIME - 20))
    tell() { touch "$run_dir/stop"; }
    finished() { [ -e "$run_dir/result.json" ]; }
fi
early=
trap early=1 USR1 # ask starts a process, which would be taken for the step below

AFLORA_MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Another port at each start: the last one's may still be closing; and one that nothing uses here, on the first node.
AFLORA_MAIN_PORT=$((20000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0}) % 20000))
while grep -Eqs "^ *[0-9]+: [0-9A-F]+:$(printf %04X $AFLORA_MAIN_PORT) " /proc/net/tcp /proc/net/tcp6; do
    AFLORA_MAIN_PORT=$((20000 + (AFLORA_MAIN_PORT - 20000 + 1) % 20000))
done
export AFLORA_MAIN_ADDRESS AFLORA_MAIN_PORT
echo "aflora: job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_JOB_NUM_NODES node(s), $what"

# One launcher a node, with the CPUs of all tasks that the job has there: it starts the ranks.
# One that ends badly ends all: nobody waits in a collective for ranks that are gone.
cpus=$((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1}))
# The ranks of a node share them: torchrun would give each one thread, and ZeRO's Adam on the CPU no more.
threads=$((cpus / ${AFLORA_PROCESSES_PER_NODE:-1}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 bash launch/slurm/node.sh "${target[@]}" "${arguments[@]}" &
step=$!
trap ask USR1
[ -z "$early" ] || ask
while :; do
    wait "$step" # returns early when the trap has run
    kill -0 "$step" 2>/dev/null || break
done
wait "$step"
status=$?
[ -z "$patience" ] || kill "$patience" 2>/dev/null

if [ -n "$asked" ] && { [ -n "$own" ] || [ "$status" -eq 0 ]; } && ! finished; then
    echo "aflora: job $job goes back into the queue"
    scontrol requeue "$job" || exit 1
    exit 0
fi
exit "$status"
