#!/bin/bash
# Caption many image folders with Slurm: each task of the array makes one dataset on its own GPU.
#
#   sbatch --array=1-$(wc -l < sources.txt) deploy/slurm_array.sh sources.txt datasets
#
# Line N of the first file has the options of task N, such as: --source folder:/data/batch-07 --title "Batch 7"
# The second argument is the folder of all datasets, on a file system that all nodes share. For one dataset on several nodes,
# see docs/cluster.md.
#SBATCH --job-name=synth
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:INT@120
# An interrupted task keeps its replies. Slurm queues a preempted task again. A task that ran out of time resumes if you submit
# it again: sbatch --array=7 ...
set -euo pipefail
sources=${1:?"pass a file with the options of each task"}
datasets=${2:?"pass the folder of the datasets"}
task=${SLURM_ARRAY_TASK_ID:?"run this script in a Slurm array"}

line=$(sed -n "${task}p" "$sources")
[ -n "$line" ] || { echo "$sources has no line $task" >&2; exit 2; }
eval "options=($line)" # quotes in the trusted file protect names with spaces
exec synth generate "${options[@]}" --out "$datasets/$(printf 'task-%04d' "$task")"
