"""Three training steps of a model that is sharded by FSDP2, and of a whole one: `torchrun sharded_training.py DEVICE`.

The first process prints both losses as JSON.
"""

import json
import os
import sys

import torch
from model_fixtures import tiny_inputs, tiny_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


STEPS = 3


def train(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def main(device_type: str) -> None:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(device_type, int(os.environ["LOCAL_RANK"])) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device_type == "cuda" else "gloo")
    whole, sharded = (tiny_model(policy_noise_std=0.0).to(device).train() for _ in range(2))
    config = whole.config
    batch = tiny_inputs(config, batch_size=2 * count)
    shape = (2 * count, config.chunk_size, config.action_dim)
    batch["actions"] = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = {name: values.to(device) for name, values in batch.items()}

    expected = train(whole, batch)
    mesh = init_device_mesh(device_type, (count,))
    for part in [*sharded.policy.blocks, *sharded.language_model.layers, sharded]:
        fully_shard(part, mesh=mesh)
    own = {name: values[2 * rank : 2 * rank + 2] for name, values in batch.items()}
    losses = train(sharded, own)
    for loss in losses:
        distributed.all_reduce(loss)
    if rank == 0:
        mean = [loss.item() / count for loss in losses]
        print(json.dumps({"losses": mean, "expected": [loss.item() for loss in expected]}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
