"""A small BERT-like classifier, its data and its training loop: the loop of accelerate's documentation.

Run under `accelerate launch` by the multi-process tests; every rank writes what it saw to OUT/rank<N>.pt.
Which samples make up the global batch of a step depends on nothing but the step.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import InitProcessGroupKwargs, set_seed
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig
from aflora_dist.compat.transformers import checkpoint_activations

GLOBAL_BATCH, LENGTH, VOCABULARY = 12, 6, 64


def build_base(layers: int = 2) -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=48,
            vocab_size=VOCABULARY,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def build_model(layers: int = 2, **adapter: Any) -> PeftModel:
    return get_peft_model(build_base(layers), AFLoRAConfig(r=4, task_type="SEQ_CLS", **adapter))


def global_batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(1, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=generator)
    return {"input_ids": tokens, "labels": (tokens.sum(1) % 2).long()}


def build_optimizer(model: nn.Module, groups: str, foreach: bool | None = None) -> torch.optim.Optimizer:
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = [p for n, p in trainable.items() if "classifier" in n]
    matrices = [p for n, p in trainable.items() if n.endswith((".A", ".B"))]
    vectors = [p for n, p in trainable.items() if n.endswith((".s_d", ".s_b"))]
    if groups == "head":
        parts = [{"params": matrices + vectors, "lr": 1e-2}, {"params": head, "lr": 2e-2, "weight_decay": 0.0}]
    elif groups == "ab":  # two groups that run empty, one long before the other
        parts = [{"params": [p for p in matrices if p.shape[0] == 4], "lr": 5e-3}]
        parts += [{"params": [p for p in matrices if p.shape[0] != 4], "lr": 2e-2}]
        parts += [{"params": vectors, "lr": 1e-2}, {"params": head, "lr": 2e-2, "weight_decay": 0.0}]
    else:  # a group of matrices alone runs empty in the middle of the list
        parts = [
            {"params": vectors, "lr": 1e-2},
            {"params": matrices, "lr": 5e-3},
            {"params": head, "lr": 2e-2, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(parts, weight_decay=0.1, foreach=foreach)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--initial", type=int, default=2)
    parser.add_argument("--final", type=int, default=3)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--clip", type=float, default=0.0)
    parser.add_argument("--groups", default="head")
    parser.add_argument("--adapter", type=json.loads, default={})
    parser.add_argument("--freezing", type=json.loads, default={})
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--precision", default="no")
    parser.add_argument("--offload", action="store_true", help="FSDP2: parameters and optimizer state in CPU memory")
    parser.add_argument("--replicas", type=int, default=1, help="HSDP: how many hold the same shards")
    parser.add_argument("--replicated", action="store_true", help="FSDP2: a part of the adapter is not sharded")
    args = parser.parse_args(arguments)
    args.out.mkdir(exist_ok=True)

    options: dict[str, Any] = {}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        options["cpu"] = True
        os.environ["FSDP_OFFLOAD_PARAMS"] = str(args.offload).lower()
        os.environ["FSDP_IGNORED_MODULES"] = r".*layer\.0\..*\.aflora(\..*)?" if args.replicated else "nothing"
        if args.replicas > 1:
            shards = int(os.environ["WORLD_SIZE"]) // args.replicas
            options["parallelism_config"] = ParallelismConfig(dp_replicate_size=args.replicas, dp_shard_size=shards)
    accelerator = Accelerator(
        **options,
        gradient_accumulation_steps=args.accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if "WORLD_SIZE" in os.environ else [],
        step_scheduler_with_optimizer=False,
        mixed_precision=args.precision,
    )
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        micro = GLOBAL_BATCH // accelerator.num_processes // args.accumulation
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro
        plugin.deepspeed_config["gradient_clipping"] = args.clip
    model = build_model(**args.adapter)
    if args.replicated and accelerator.process_index:  # as where ranks draw an adapter without a common seed
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layer.0" in name and "aflora" in name:
                    parameter += 0.1
    if args.checkpointing:
        model.enable_input_require_grads()
        checkpoint_activations(model.base_model.model)
    optimizer = build_optimizer(model, args.groups, args.replicated or None)  # as torch chooses it on a GPU
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (2 * args.steps))
    config = FreezingConfig(total_steps=args.steps, initial_steps=args.initial, final_steps=args.final, **args.freezing)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    initial_bytes = None

    losses, rates, at_freeze = [], [], {}
    model.train()
    for step in range(args.steps):
        batch = global_batch(step)
        total = 0.0
        per_rank = GLOBAL_BATCH // accelerator.num_processes
        mine = {k: v[accelerator.process_index * per_rank :][:per_rank] for k, v in batch.items()}
        for i in range(args.accumulation):
            size = per_rank // args.accumulation
            micro_batch = {k: v[i * size : (i + 1) * size].to(accelerator.device) for k, v in mine.items()}
            with accelerator.accumulate(model):
                loss = model(**micro_batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.clip:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        scheduler.step()
        losses.append(accelerator.reduce(total / args.accumulation, "mean").item())
        rates.append([group["lr"] for group in freezing.engine.optimizer.param_groups])
        if initial_bytes is None:
            initial_bytes = freezing.optimizer_state_bytes()
            initial_params = freezing.trainable_params
        for name in freezing.frozen:
            if freezing.frozen[name] == step:
                at_freeze[name] = freezing.engine.values([name])[name].clone()
    final = freezing.engine.values([n for n in freezing.engine.parameters if "aflora" in n or "modules_to_save" in n])
    result = {
        "kind": freezing.engine.kind,
        "world_size": accelerator.num_processes,
        "losses": losses,
        "rates": rates,
        "events": [vars(e) for e in freezing.events],
        "initial_bytes": initial_bytes,
        "initial_params": initial_params,
        "at_freeze": {k: v.float().cpu() for k, v in at_freeze.items()},
        "final": {k: v.detach().float().cpu().clone() for k, v in final.items()},
    }
    torch.save(result, args.out / f"rank{os.environ.get('RANK', '0')}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
