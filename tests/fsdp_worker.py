"""Gradients of both stages, of the whole model and sharded over two processes by FSDP2 as accelerate does it.

torchrun --nproc_per_node 2 fsdp_worker.py HOME OUT MODEL
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from uptraining import run

from surgery.train.prepare import prepare
from surgery.train.schedule import schedule
from surgery.train.trainer import Uptrainer
from surgery.train.uptrain import leave, train


def trainer_of(home, out, model, **options):
    made = {}

    class Stop(Exception):
        pass

    def go(self, resume):
        made["trainer"] = self
        raise Stop

    setup = prepare(run(home, out, model=model, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Uptrainer, "go", go)
        with pytest.raises(Stop):
            train(setup)
    return made["trainer"], setup


def shard(model):
    """Units as accelerate makes them: decoder layers; norm, embedding and head; the rest."""
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    tail = [model.model.norm, model.get_input_embeddings(), model.get_output_embeddings()]
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)


def main(home, out, model):
    trainer, setup = trainer_of(home, out / "run", model)
    inputs = next(iter(trainer.text))
    rank, world = trainer.args.process_index, trainer.accelerator.num_processes
    assert world == 2
    whole = {name: trainer.accelerator.gather(tensor) for name, tensor in inputs.items()}
    count = (whole["labels"] != -100).sum()
    found = {}
    stages = {
        stage.name: schedule(setup.uptrain, setup.length, 64).stages[i] for i, stage in enumerate(setup.schedule.stages)
    }
    for name, stage in stages.items():
        trainer.state.global_step = stage.begin
        setup.model.zero_grad()
        (trainer.compute_loss(setup.model, dict(whole), num_items_in_batch=count) / world).backward()
        trainer.remove_hooks()
        found[name] = [{n: p.grad.clone() for n, p in setup.model.named_parameters() if p.grad is not None}]
    shard(setup.model)
    trainer.is_fsdp_enabled = True
    for name, stage in stages.items():
        trainer.state.global_step = stage.begin
        setup.model.zero_grad()
        trainer.compute_loss(setup.model, dict(inputs), num_items_in_batch=count).backward()
        trainer.remove_hooks()
        found[name].append({n: p.grad.full_tensor() for n, p in setup.model.named_parameters() if p.grad is not None})
    if rank == 0:
        torch.save(found, out / "gradients.pt")
    trainer.accelerator.wait_for_everyone()
    leave()
    os._exit(0)  # gradients are saved; threads of gloo may still abort an interpreter that ends in order


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
