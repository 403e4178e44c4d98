#!/usr/bin/env bash
# Evaluate a fine-tuned BEiT on one device: top-1, top-5 and loss on val/. It needs no training images.
#
#   bash test/train_eval_1p.sh --data_path=demo --resume=./train_result
#   bash test/train_eval_1p.sh --data_path=/data/ImageNet2012 --resume=./train_result/checkpoint-29.pth
#
# Options, as --key=value:
#   --data_path=DIR        folder with train/ and val/ of class folders, or the word demo: handwritten digits
#   --resume=FILE|DIR      the checkpoint, or the folder that holds it (then its checkpoint-best.pth)
#   --model=NAME           only for weights without a description; see python run_class_finetuning.py --help
#   --batch_size=N         evaluation takes 1.5 times as many at once (64)
#   --nb_classes=N         checked against the folders
#   --device=NAME          auto (the first available of npu, cuda, cpu), npu, cuda or cpu
#   --nproc_per_node=N     devices (1); every image is counted exactly once
# Every other flag goes to run_class_finetuning.py. PYTHON=/path/to/python chooses the Python.
# If another run writes the same log, the names of this run's files end in -2, -3 and so on.
# Log: test/output/0/train_0_eval.log; figures for tools: test/output/0/<model>_bs<N>_<devices>p_eval.log
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch eval 1 "$@"
