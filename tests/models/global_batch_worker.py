"""One of two processes that share a batch; run by test_global_batch.

Usage: global_batch_worker.py RANK WORLD FOLDER
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from small_model import NO_DROPOUT, build, make_batch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

# Settings, dtype, and whether each process holds a share of the weights (FSDP) or all (DDP).
CASES = [
    ({}, torch.float64, False),
    ({"local_alignment": "max", "alignment_view": "full"}, torch.float64, False),
    ({"mlm_loss_on": "all", "fusion": "gap_add", "false_negatives": "none"}, torch.float64, False),
    ({}, torch.float32, False),
    ({}, torch.float64, True),
    ({"global_alignment": False, "fusion": "gap_add"}, torch.float64, True),
]
LENGTHS = (9, 14, 5, 11, 6, 20, 3, 8)


def global_batch(dtype):
    inputs = make_batch(LENGTHS, seed=1)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    # Two reports of different ranks are identical.
    for name in ("input_ids", "attention_mask", "word_ids"):
        inputs[name][6] = inputs[name][1]
    inputs["report_ids"][6] = inputs["report_ids"][1]
    return inputs


def own_share(inputs, rank, world):
    """Contiguous rows, padded to the longest report of their own only."""
    rows = len(LENGTHS) // world
    share = {name: value[rank * rows : (rank + 1) * rows] for name, value in inputs.items()}
    longest = int(share["attention_mask"].sum(1).max())
    for name in ("input_ids", "attention_mask", "word_ids"):
        share[name] = share[name][:, :longest]
    return share


def step(model, inputs):
    """Parts of the loss as a dict, and the gradient of each parameter."""
    output = model(**inputs)
    output.loss.backward()
    names = ("loss", "loss_image", "loss_report", "loss_global", "loss_local")
    losses = {n: output[n].detach() for n in names if n in output}
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def sharded(model):
    """FSDP as accelerate wraps a model: the modules it names, and what is left."""
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    return fully_shard(model)


def shared_step(settings, dtype, shard, rank, world):
    """What `step` gives, with losses averaged over the processes."""
    model = build(**(NO_DROPOUT | settings)).to(dtype)
    model = sharded(model) if shard else DistributedDataParallel(model)
    losses, gradients = step(model, own_share(global_batch(dtype), rank, world))
    for loss in losses.values():
        dist.all_reduce(loss)
        loss /= world
    if shard:
        gradients = {n: g.full_tensor() for n, g in gradients.items()}
    gradients = {n.removeprefix("module."): g.clone() for n, g in gradients.items()}
    return {"losses": losses, "gradients": gradients}


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    # Whoever waits for a process that has failed must not wait for gloo's half an hour.
    limit = timedelta(seconds=120)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        timeout=limit,
        rank=rank,
        world_size=world,
    )
    found = [shared_step(*case, rank, world) for case in CASES]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    # Neither may leave while the other still uses their connection.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
