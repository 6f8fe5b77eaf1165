"""One rank of many that do not exist (torch's fake process group): which score fragments it holds, as JSON.

A step cannot be taken there: DDP's hook gets no tensors from the fake group's collectives.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import get_peft_model
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import BertConfig, BertModel

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    os.environ.update(LOCAL_RANK="0", RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    accelerator = Accelerator(cpu=True)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = get_peft_model(BertModel(BertConfig(**sizes, vocab_size=100), add_pooling_layer=False), AFLoRAConfig(r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    AdaptiveFreezing._agree = lambda *_: None  # type: ignore[method-assign]  # sums of this group are this rank's own
    never = FreezingConfig(total_steps=10**9, initial_steps=10**9 - 1, final_steps=0)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, never)
    fragments = [[f.name, f.start, f.numel] for f in freezing.engine.buckets(freezing.freezable)[0]]
    print(json.dumps({"numels": freezing.numels, "fragments": fragments}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
