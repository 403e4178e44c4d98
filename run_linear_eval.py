#!/usr/bin/env python3
"""Train a linear classifier on each block of a frozen BEiT: the linear probe.

A classifier takes [class token; mean of the patch tokens] of its block. All are trained together and evaluated each
epoch; output_dir/linear_eval.csv has the accuracy of each. --knn adds the accuracy of the nearest training images.
"""

if __name__ == '__main__':
    from beit import startup
    startup.prepare()
    import check_flags
    check_flags.check_command_line('run_linear_eval.py', __doc__)

import argparse
import dataclasses
import functools
import os
import sys
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

import datasets
import engine_for_finetuning as engine
import flags
import run_class_finetuning as finetuning
import utils
from beit import log
from beit.checkpoint.inference_model import LoadedModel, load_for_inference
from beit.config import InputConfig, OutputConfig
from beit.devices import accelerator
from beit.distributed import collectives, preemption, process_group
from beit.errors import UserError, escape_text, refuse
from beit.files import run_folder
from beit.training import metrics
from check_flags import check_args

TEMPERATURE = 0.07  # of the neighbours' weights, as in DINO (https://arxiv.org/abs/2104.14294, appendix)
run_folder.register_output(r'linear_eval\.csv', at_end=True)

build_parser = functools.partial(flags.build_parser, flags.PROBE, __doc__)


def main(args: argparse.Namespace, signals: preemption.Signals) -> None:
    check_args(args)
    device = finetuning.start(args, flags.PROBE)
    with run_folder.locked(args.output_dir, device):
        probe(args, signals, device)


def probe(args: argparse.Namespace, signals: preemption.Signals, device: torch.device) -> None:
    """The run, while it holds the lock of its folder: the steps of a training, with a head on each layer."""
    loaded = load_backbone(args)
    checkpoint = finetuning.load_checkpoint(args, device)
    dtype = finetuning.choose_precision(args, device)
    utils.seed_everything(args.seed)
    known = {flag.name for _, flag in flags.flags_of(flags.PROBE)} - {'config'}
    output = flags.config_from(args, OutputConfig, flags={name: vars(args)[name] for name in sorted(known)})

    data = finetuning.prepare_data(args, device, checkpoint, loaded.preprocessing, args.eval_data_path)
    check_data(args, data)
    loaded.model.probe_layers(len(data.classes))
    data.layers = len(loaded.model.blocks)
    learner = finetuning.build_learner(args, loaded.model, checkpoint, device, dtype)
    report = finetuning.build_report(args, output, data, learner)
    finetuning.resume_and_train(args, signals, data, learner, report, checkpoint)
    write_results(args, neighbor_accuracies(args, data, learner) if args.knn else None)


def load_backbone(args: argparse.Namespace) -> LoadedModel:
    """The model of --finetune, whose architecture and preprocessing the run takes; flags that are given win."""
    given = {name: getattr(args, name) for name in ('input_size', 'crop_pct', 'eval_fit', 'exif', 'background',
                                                    'imagenet_default_mean_and_std') if name in args.given}
    try:
        loaded = load_for_inference(args.finetune, needs_head=False, model_key=args.model_key,
                                    model_prefix=args.model_prefix, model=args.model if 'model' in args.given else None,
                                    **given)
    except UserError as error:
        raise UserError(str(error).replace('--resume', '--finetune')) from None
    vars(args).update(dataclasses.asdict(loaded.config), **loaded.preprocessing.flags)
    return loaded


def check_data(args: argparse.Namespace, data: finetuning.Data) -> None:
    images = len(data.train_set) if data.train_set is not None else 0
    refuse(data.spec.multi_label, args, 'train_csv', ': its images have several classes each, and a probe needs one')
    refuse(args.knn > images, args, 'knn', ': there are %d training images; lower it' % images)


# ---- nearest neighbours

def unit_features(network: torch.nn.Module, loader: Any, device: torch.device
                  ) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Yield (features of each layer, float32 (layers, B, 2 D) of length 1; class indices (B,)) of each batch."""
    timer = utils.StepTimer(device)
    for batch in utils.MetricLogger().log_every(loader, len(loader), 'Features:', timer):
        if len(batch.images):
            found = network(engine.pad_batch(batch.images, loader))[:len(batch.images)].float()
            yield F.normalize(found, dim=2).transpose(0, 1), batch.targets


def nearest(similar: torch.Tensor, labels: torch.Tensor, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest similarities of the last dimension, and their labels."""
    similar, chosen = similar.topk(count, dim=2)
    return similar, labels.gather(2, chosen)


@torch.no_grad()
def neighbor_accuracies(args: argparse.Namespace, data: finetuning.Data, learner: finetuning.Learner) -> List[float]:
    """The top-1 accuracy, in percent, of each layer's vote of the --knn training images of highest cosine similarity.

    A neighbour weighs exp(similarity / 0.07). The memory holds the validation features; training images are streamed.
    """
    network, device, model = learner.model, learner.device, accelerator.unwrap(learner.model)
    network.eval()  # in PyTorch 1.5, DistributedDataParallel returns nothing
    model.head = torch.nn.ModuleList(torch.nn.Identity() for _ in range(data.layers))
    config = flags.config_from(args, InputConfig, evaluation=data.spec.preprocessing, dist_eval=True)
    train_set = datasets.without_augmentation(data.train_set, config)
    _, train_loader = datasets.build_loaders(config, None, train_set, device)
    parts = list(unit_features(network, data.val_loader, device))
    queries, targets = torch.cat([part for part, _ in parts], 1), torch.cat([part for _, part in parts])
    if args.dist_eval and process_group.world_size() > 1:
        queries, targets = collectives.all_gather_rows([queries.transpose(0, 1), targets], device)
        queries = queries.to(device).transpose(0, 1)
    similar = queries.new_full(queries.shape[:2] + (args.knn,), -float('inf'))
    labels = torch.zeros_like(similar, dtype=torch.int64)
    for features, classes in unit_features(network, train_loader, device):
        found = queries @ features.transpose(1, 2)  # (layers, queries, B)
        similar, labels = nearest(torch.cat((similar, found), 2), torch.cat((labels, classes.expand_as(found)), 2),
                                  args.knn)
    if process_group.world_size() > 1:
        rows = collectives.all_gather_rows([similar.permute(2, 0, 1), labels.permute(2, 0, 1)], device)
        similar, labels = nearest(rows[0].permute(1, 2, 0), rows[1].permute(1, 2, 0), args.knn)
    weights, labels, targets = (similar.cpu().double() / TEMPERATURE).exp(), labels.cpu(), targets.cpu()
    votes = (torch.zeros(len(weight), len(data.classes), dtype=torch.float64).scatter_add_(1, label, weight)
             for weight, label in zip(weights, labels))
    return [100. * (metrics.top_classes(vote, 1)[:, 0] == targets).double().mean().item() for vote in votes]


# ---- results

def write_results(args: argparse.Namespace, knn: Optional[Sequence[float]]) -> None:
    """Print and write output_dir/linear_eval.csv: each layer's figures after the last epoch, and its best accuracy."""
    if not process_group.is_main_process():
        return
    evaluated = [stats['test_layers'] for stats in run_folder.read_log(args.output_dir) if 'test_layers' in stats]
    if not evaluated:
        raise UserError('--output_dir %s: its log.txt has no evaluation' % escape_text(args.output_dir))
    rows = []
    for layer, figures in evaluated[-1].items():
        rows.append(dict({'layer': layer}, **figures, best_acc1=max(each[layer]['acc1'] for each in evaluated)))
        if knn is not None:
            rows[-1]['knn%d_acc1' % args.knn] = knn[int(layer) - 1]
        log.log_main('Layer %s: %s' % (layer, ' '.join('%s %.4g' % (name, value) for name, value in rows[-1].items()
                                                       if name != 'layer')))
    path = os.path.join(args.output_dir, 'linear_eval.csv')
    metrics.write_results(path, rows)
    log.log_main('Results: %s' % escape_text(path))


def run(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; exit statuses as in a training."""
    return finetuning.run(argv, flags.PROBE, __doc__, main)


if __name__ == '__main__':
    sys.exit(run())
