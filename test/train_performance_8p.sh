#!/usr/bin/env bash
# Train BEiT for 50 steps on eight devices and report images per second. Nothing is evaluated or saved.
#
#   bash test/train_performance_8p.sh --data_path=/data/ImageNet2012
#   bash test/train_performance_8p.sh --data_path=demo --device=cpu --nproc_per_node=2
#
# Options, as --key=value:
#   --data_path=DIR        folder with train/ and val/ of class folders, or the word demo: handwritten digits
#   --maxstep=N            update steps (50); the first 5 are not counted
#   --nproc_per_node=N     devices of this machine, one process each (8)
#   --nnodes=N --node_rank=I --master_addr=HOST --master_port=PORT   for several machines; run the script on each
#   --finetune=FILE        pretrained weights (checkpoints/…_pt22k_ft22k.pth if it exists, else random)
#   --model=NAME           beit_base_patch16_224; see python run_class_finetuning.py --help
#   --batch_size=N         images per device (the recipe's: 64 for base, 32 for large)
#   --device=NAME          auto (the first available of npu, cuda, cpu), npu, cuda or cpu
# Every other flag goes to run_class_finetuning.py. PYTHON=/path/to/python chooses the Python.
# DIST_WAIT_SECONDS=N is how long processes wait for each other at the start (300).
# If another run writes the same log, the names of this run's files end in -2, -3 and so on.
# Log: test/output/0/train_0_perf.log; figures for tools: test/output/0/<model>_bs<N>_<devices>p_perf.log
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch performance 8 "$@"
