#!/bin/bash
# Caption many folders of images with Slurm: each task of the array makes one dataset, on a GPU of its own.
#
#   sbatch --array=1-$(wc -l < sources.txt) deploy/slurm_array.sh sources.txt datasets
#
# Line N of the first file are the options of task N, such as: --source folder:/data/batch-07 --title "Batch 7"
# The second argument is the folder of all datasets, on a file system that every node sees. One dataset over several nodes is
# another thing: see "On a cluster" in docs/guide.md.
#SBATCH --job-name=synth
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:INT@120
# Every reply of a task that is interrupted is kept. Slurm itself queues a preempted task again; one that ran out of time goes on
# where it stopped if you submit it again: sbatch --array=7 ...
set -euo pipefail
sources=${1:?"name a file with the options of each task"}
datasets=${2:?"name the folder of the datasets"}
task=${SLURM_ARRAY_TASK_ID:?"this runs within an array of Slurm"}

line=$(sed -n "${task}p" "$sources")
[ -n "$line" ] || { echo "$sources has no line $task" >&2; exit 2; }
eval "options=($line)" # the file is the user's own: quotes in it hold names with spaces together
exec synth generate "${options[@]}" --out "$datasets/$(printf 'task-%04d' "$task")"
