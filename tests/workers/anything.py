"""Freezes what is not AFLoRA's: LoRA and full fine-tuning. Run under `accelerate launch`, or alone.

Every rank writes what it saw to OUT/rank<N>.pt.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from peft import LoraConfig, get_peft_model
from torch import nn

from aflora_dist import AdaptiveFreezing, FreezingConfig
from aflora_dist.compat.transformers import checkpoint_activations
from tests.workers.tiny import GLOBAL_BATCH, build_base, build_model, global_batch

CONFIG = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3)


def build(kind: str) -> nn.Module:
    base = build_base()
    if kind == "full":
        return base
    if kind == "aflora":
        return build_model()
    targets = ["query", "value", "intermediate.dense", "output.dense"]
    return get_peft_model(base, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=targets, init_lora_weights=False))


def create_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    spared = [p for n, p in trained.items() if n.endswith("bias") or "LayerNorm" in n]
    others = [p for p in trained.values() if all(p is not one for one in spared)]
    return torch.optim.AdamW([{"params": others}, {"params": spared, "weight_decay": 0.0}], lr=5e-3, weight_decay=0.1)


def create_accelerator() -> Accelerator:
    several = {"kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]} if "WORLD_SIZE" in os.environ else {}
    fsdp = {"cpu": True} if os.environ.get("ACCELERATE_USE_FSDP") == "true" else {}
    accelerator = Accelerator(**several, **fsdp)  # type: ignore[arg-type]
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH // accelerator.num_processes
    return accelerator


class Training:
    """A user's loop over the tiny model, however it is adapted."""

    def __init__(
        self, kind: str, config: FreezingConfig = CONFIG, freezable: Any = None, recompute: bool = False
    ) -> None:
        self.accelerator = create_accelerator()
        model = build(kind)
        if recompute:  # as PEFT and Trainer do
            checkpoint_activations(model)
            model.enable_input_require_grads()  # type: ignore[operator]
        self.blocks = next(m for n, m in model.named_modules() if n.endswith("encoder.layer"))
        self.model, self.optimizer = self.accelerator.prepare(model, create_optimizer(model))
        self.freezing = AdaptiveFreezing(self.accelerator, self.model, self.optimizer, config, freezable=freezable)
        self.losses: list[float] = []
        self.at_freeze: dict[str, torch.Tensor] = {}

    def train(self, start: int, stop: int) -> None:
        self.model.train()
        share = GLOBAL_BATCH // self.accelerator.num_processes
        for step in range(start, stop):
            batch = {k: v[self.accelerator.process_index * share :][:share] for k, v in global_batch(step).items()}
            loss = self.model(**batch).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(self.accelerator.reduce(loss.detach(), "mean").item())
            for name in [n for n, at in self.freezing.frozen.items() if at == step]:
                self.at_freeze[name] = self.freezing.engine.values([name])[name].clone()

    def kept(self) -> list[tuple[int, bool]]:
        """Of each block in one more forward pass: tensors that are kept for backward; whether its output needs it."""
        counts: list[int] = []
        outputs: list[bool] = []

        def begin(*_: Any) -> None:
            counts.append(0)

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).requires_grad)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if counts and len(outputs) < len(counts):
                counts[-1] += 1
            return tensor

        handles = []
        for block in self.blocks.children():
            handles.append(block.register_forward_pre_hook(begin))
            handles.append(block.register_forward_hook(end))
        self.model.train()
        share = GLOBAL_BATCH // self.accelerator.num_processes
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.model(**{k: v[:share] for k, v in global_batch(0).items()}).loss
        for handle in handles:
            handle.remove()
        self.accelerator.backward(loss)
        self.optimizer.zero_grad()
        return list(zip(counts, outputs, strict=True))

    def values(self) -> dict[str, torch.Tensor]:
        engine = self.freezing.engine
        ours = {*self.freezing.freezable, *self.freezing.frozen, *engine.trainable}
        names = [n for n in engine.parameters if n in ours]
        return {name: value.float().cpu() for name, value in engine.values(names).items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("kind")
    parser.add_argument("--freezable", type=json.loads)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--freezing", type=json.loads, default={})
    args = parser.parse_args(arguments)
    args.out.mkdir(exist_ok=True)
    training = Training(args.kind, replace(CONFIG, **args.freezing), args.freezable, args.recompute)
    engine = training.freezing.engine
    training.train(0, 5)
    tensors, record = training.freezing.progress.snapshot()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    training.train(5, CONFIG.total_steps)
    events, final, losses = [vars(e) for e in training.freezing.events], training.values(), list(training.losses)
    training.freezing.progress.restore(tensors, json.loads(json.dumps(record)))
    training.train(5, CONFIG.total_steps)
    again = training.values()
    result = {
        "kind": engine.kind,
        "world_size": training.accelerator.num_processes,
        "events": events,
        "losses": losses,
        "final": final,
        "at_freeze": training.at_freeze,
        "again": ([vars(e) for e in training.freezing.events], again, training.losses[CONFIG.total_steps :]),
        "trainable": engine.trainable,
        "kept": training.kept(),
    }
    torch.save(result, args.out / f"rank{os.environ.get('RANK', '0')}.pt")
    training.accelerator.end_training()


if __name__ == "__main__":
    main()
