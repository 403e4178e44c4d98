#!/usr/bin/env bash
# Fine-tune BEiT for 30 epochs on eight devices and report the accuracy.
#
#   bash test/train_full_8p.sh --data_path=/data/ImageNet2012
#   bash test/train_full_8p.sh --data_path=demo --device=cpu --nproc_per_node=2
#
# Options, as --key=value:
#   --data_path=DIR        folder with train/ and val/ of class folders, or the word demo: handwritten digits
#   --nproc_per_node=N     devices of this machine, one process each (8)
#   --nnodes=N --node_rank=I --master_addr=HOST --master_port=PORT   for several machines; run the script on each
#   --finetune=FILE|NAME   pretrained weights (checkpoints/beit_base_patch16_224_pt22k_ft22k.pth); empty: from scratch
#   --resume=FILE|DIR      continue from a checkpoint, or from the newest in a folder
#   --auto_resume          continue if output_dir holds a checkpoint of this run: for jobs that may be killed
#   --max_restarts=N       how often torchrun restarts all processes after a failure (0); with --auto_resume
#   --save_ckpt_minutes=N  checkpoints in mid-epoch too (none); a signal always saves one
#   --output_dir=DIR       checkpoints and log.txt (./train_result), of one run; an earlier one moves to a backup folder
#   --model=NAME           beit_base_patch16_224; see python run_class_finetuning.py --help
#   --batch_size=N         images per device (the recipe's: 64 for base, 32 for large)
#   --epochs=N             the recipe's (30 for the usual weights); the demo 40
#   --nb_classes=N         checked against the folders
#   --device=NAME          auto (the first available of npu, cuda, cpu), npu, cuda or cpu
# Every other flag goes to run_class_finetuning.py. PYTHON=/path/to/python chooses the Python.
# DIST_WAIT_SECONDS=N is how long processes wait for each other at the start (300).
# If another run writes the same log, the names of this run's files end in -2, -3 and so on.
# Log: test/output/0/train_0.log; figures for tools: test/output/0/<model>_bs<N>_<devices>p_acc.log
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch full 8 "$@"
