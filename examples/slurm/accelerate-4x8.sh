#!/bin/bash
# Four machines with eight GPUs each, with accelerate:
#     sbatch examples/slurm/accelerate-4x8.sh [more flags of sdnb.train]
# Change the account, the partition, the time and the sizes to those of your cluster.
#SBATCH --job-name=sdnb
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1  # accelerate launch starts the ranks of its machine
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue  # also when a machine fails, or another job takes it
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120  # to this script, two minutes before the time is over

export MODEL=${MODEL:-CompVis/stable-diffusion-v1-4}
export DATA=${DATA:-lambdalabs/naruto-blip-captions}
export STEPS=${STEPS:-101}
export OUTPUT=${OUTPUT:-$PWD/sd-naruto-$SLURM_JOB_ID}  # a folder that all machines share
export GPUS=${GPUS:-8}  # of a machine
export PRECISION=${PRECISION:-fp16}
export PORT=${PORT:-29500}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not read what sbatch was given
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN

# sdnb saves a checkpoint on SIGTERM. Then the job goes back into the queue, and resumes from it.
trap 'requeue=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# Each machine fills in its own SLURM_NODEID.
srun bash -c 'exec accelerate launch --multi_gpu --mixed_precision "$PRECISION" --dynamo_backend no \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes $((SLURM_NNODES * GPUS)) \
    --main_process_ip "$MAIN" --main_process_port "$PORT" \
    -m sdnb.train --pretrained_model_name_or_path "$MODEL" --dataset_name "$DATA" \
    --use_ema --resolution 512 --center_crop --random_flip --train_batch_size 8 --gradient_accumulation_steps 4 \
    --max_train_steps "$STEPS" --learning_rate 1e-05 --max_grad_norm 1 --lr_scheduler constant --lr_warmup_steps 0 \
    --output_dir "$OUTPUT" --checkpointing_steps 500 --resume_from_checkpoint latest "$@"' - "$@" &

wait $! || wait $!  # the signal ends the first one
status=$?
if [ "$status" != 0 ] && [ -n "$requeue" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
