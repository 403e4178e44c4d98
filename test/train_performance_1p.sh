#!/usr/bin/env bash
# Train BEiT for 50 steps on one device and report images per second. Nothing is evaluated or saved.
#
#   bash test/train_performance_1p.sh --data_path=demo
#   bash test/train_performance_1p.sh --data_path=/data/ImageNet2012
#
# Options, as --key=value:
#   --data_path=DIR        folder with train/ and val/ of class folders, or the word demo: handwritten digits
#   --maxstep=N            update steps (50); the first 5 are not counted
#   --finetune=FILE        pretrained weights (checkpoints/…_pt22k_ft22k.pth if it exists, else random)
#   --model=NAME           beit_base_patch16_224; see python run_class_finetuning.py --help
#   --batch_size=N         images per device (the recipe's: 64 for base, 32 for large)
#   --device=NAME          auto (the first available of npu, cuda, cpu), npu, cuda or cpu
#   --nproc_per_node=N     devices (1)
# Every other flag goes to run_class_finetuning.py. PYTHON=/path/to/python chooses the Python.
# If another run writes the same log, the names of this run's files end in -2, -3 and so on.
# Log: test/output/0/train_0_perf.log; figures for tools: test/output/0/<model>_bs<N>_<devices>p_perf.log
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch performance 1 "$@"
