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
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
)

from aflora_dist import AdaptiveFreezing, FreezingConfig
from aflora_dist.compat.transformers import checkpoint_activations
from profiling.traffic import Traffic
from tests.workers.tiny import GLOBAL_BATCH, VOCABULARY, build_base, build_model, global_batch

CONFIG = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3)
WRAPPED = {"deberta": "DebertaV2Layer", "experts": "Qwen3MoeDecoderLayer"}  # by FSDP2
CUT = 5  # global batches before the snapshot


def build(kind: str) -> nn.Module:
    base = build_base()
    if kind == "full":
        return base
    if kind == "bag":
        base.bert.bag = nn.EmbeddingBag(4, 4).requires_grad_(False)
        return base
    if kind == "deberta":  # whose blocks share embeddings of positions, which stand behind them
        return DebertaV2ForSequenceClassification(
            DebertaV2Config(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=20,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pooler_hidden_size=16,
                pooler_dropout=0.0,
                relative_attention=True,
                position_buckets=4,
                norm_rel_ebd="layer_norm",
                share_att_key=True,
                pos_att_type=["p2c", "c2p"],
            )
        )
    if kind == "experts":  # a mixture's weights, one parameter of three dimensions for all experts
        set_seed(0)
        mixture = Qwen3MoeForSequenceClassification(
            Qwen3MoeConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=20,
                moe_intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                pad_token_id=0,
            )
        )
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        lora = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], target_parameters=experts)
        lora.init_lora_weights = False
        return get_peft_model(mixture, lora)
    if kind == "aflora":
        return build_model()
    targets = ["query", "value", "intermediate.dense", "output.dense"]
    return get_peft_model(base, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=targets, init_lora_weights=False))


def create_optimizer(model: nn.Module, momentum: bool = False) -> torch.optim.Optimizer:
    """Adam, or SGD, whose momentum is all of its state."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    spared = [p for n, p in trained.items() if n.endswith("bias") or "LayerNorm" in n]
    others = [p for p in trained.values() if all(p is not one for one in spared)]
    groups = [{"params": others}, {"params": spared, "weight_decay": 0.0}]
    if momentum:
        return torch.optim.SGD(groups, lr=5e-2, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(groups, lr=5e-3, weight_decay=0.1)


def create_accelerator(
    accumulation: int = 1, clip: float = 0.0, shard_all: bool = False, unused: bool = False, ahead: bool = True
) -> Accelerator:
    handlers = [InitProcessGroupKwargs(backend="gloo"), DistributedDataParallelKwargs(find_unused_parameters=unused)]
    several = {"kwargs_handlers": handlers} if "WORLD_SIZE" in os.environ else {}
    fsdp = {"cpu": True} if os.environ.get("ACCELERATE_USE_FSDP") == "true" else {}
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, **several, **fsdp)  # type: ignore[arg-type]
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        micro_batch = GLOBAL_BATCH // accelerator.num_processes // accumulation
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro_batch
        plugin.deepspeed_config["gradient_clipping"] = clip
        if shard_all:
            plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if not ahead:
            plugin.deepspeed_config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
    return accelerator


class Gathers(TorchDispatchMode):
    """While entered, counts the all-gathers, and takes note of what ZeRO-3 shards and is whole at any operator."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.count = 0
        self.whole: set[str] = set()
        self._sharded: dict[str, Any] = {n: p for n, p in parameters.items() if hasattr(p, "ds_status")}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d" and "allgather" in func.name()
        self.whole |= {name for name, p in self._sharded.items() if p.ds_status.name != "NOT_AVAILABLE"}
        return func(*args, **(kwargs or {}))


class Training:
    """A user's loop over the tiny model, however it is adapted."""

    def __init__(
        self,
        kind: str,
        config: FreezingConfig = CONFIG,
        freezable: Any = None,
        recompute: bool | str = False,
        momentum: bool = False,
        accumulation: int = 1,
        clip: float = 0.0,
        shard_all: bool = False,
        reference: bool = False,
        unused: bool = False,
        ahead: bool = True,
    ) -> None:
        # What FSDP2 wraps, if that is the engine.
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = WRAPPED.get(kind, "BertLayer")
        model = build(kind)  # for ZeRO-3 transformers draws some models' weights otherwise once there is an accelerator
        self.accelerator = create_accelerator(accumulation, clip, shard_all, unused, ahead)
        self.accumulation, self.clip, self.reference = accumulation, clip, reference
        if recompute:  # as PEFT and Trainer do
            checkpoint_activations(model, use_reentrant=recompute == "reentrantly")
            model.enable_input_require_grads()  # type: ignore[operator]
        self.blocks = next(m for n, m in model.named_modules() if n.endswith(("encoder.layer", "model.layers")))
        self.model, self.optimizer = self.accelerator.prepare(model, create_optimizer(model, momentum))
        self.freezing = AdaptiveFreezing(self.accelerator, self.model, self.optimizer, config, freezable=freezable)
        self.losses: list[float] = []
        self.at_freeze: dict[str, torch.Tensor] = {}

    def train(self, start: int, stop: int) -> None:
        self.model.train()
        ranks, clips = self.accelerator.num_processes, self.accelerator.state.deepspeed_plugin is None and self.clip
        share = GLOBAL_BATCH // ranks // self.accumulation
        for step in range(start, stop):
            mean = 0.0
            for micro in range(self.accumulation):
                first = (micro * ranks + self.accelerator.process_index) * share
                batch = {k: v[first : first + share] for k, v in global_batch(step).items()}
                with self.accelerator.accumulate(self.model):
                    loss = self.model(**batch).loss
                    if self.reference:  # as TRL's DPO has its own, after the trained model's pass
                        with torch.no_grad(), self.accelerator.unwrap_model(self.model).disable_adapter():
                            self.model(**batch)
                    self.accelerator.backward(loss)
                    if clips and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                mean += self.accelerator.reduce(loss.detach(), "mean").item() / self.accumulation
            self.losses.append(mean)
            for name in [n for n, at in self.freezing.frozen.items() if at == step]:
                self.at_freeze[name] = self.freezing.engine.values([name])[name].clone()

    def between_decisions(self) -> dict[str, int]:
        """Bytes sent in two updates that are observed and in two that are not; elements of the largest tensor kept."""
        self.train(0, 2)
        with Traffic() as observed:
            self.train(2, 4)
        largest = max((tensor.numel() for tensor in tensors_of(self.freezing._scores)), default=0)
        self.freezing.engine.observer = None
        with Traffic() as free:
            self.train(4, 6)
        return {"observed": observed.bytes, "free": free.bytes, "largest": largest}

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
        with Traffic() as self.traffic, Gathers(self.freezing.engine.parameters) as self.gathers:
            self.accelerator.backward(loss)
        self.optimizer.zero_grad()
        return list(zip(counts, outputs, strict=True))

    def values(self) -> dict[str, torch.Tensor]:
        engine = self.freezing.engine
        ours = {*self.freezing.freezable, *self.freezing.frozen, *engine.trainable}
        names = [n for n in engine.parameters if n in ours]
        return {name: value.float().cpu() for name, value in engine.values(names).items()}


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors that an object of control or freezing holds itself."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors_of(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    ours = type(value).__module__.startswith(("aflora_dist.control", "aflora_dist.freezing"))
    return tensors_of(vars(value)) if ours and not isinstance(value, FreezingConfig) else []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("kind")
    parser.add_argument("--freezable", type=json.loads)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--momentum", action="store_true", help="SGD")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--clip", type=float, default=0.0)
    parser.add_argument("--reference", action="store_true", help="each step asks the model without its adapter, too")
    parser.add_argument("--shard-all", action="store_true", help="ZeRO-3 keeps no small parameter whole")
    parser.add_argument("--freezing", type=json.loads, default={})
    parser.add_argument("--from", dest="start", type=Path, help="go on from the snapshot of a rank 0 of this folder")
    parser.add_argument("--replicated", action="store_true", help="FSDP2 leaves the adapter out of the sharding")
    parser.add_argument("--count", action="store_true", help="only what is sent and kept between decisions")
    args = parser.parse_args(arguments)
    args.out.mkdir(exist_ok=True)
    config = replace(CONFIG, **args.freezing)
    os.environ["FSDP_IGNORED_MODULES"] = r".*\.lora_.*" if args.replicated else "nothing"
    loop = {name: getattr(args, name) for name in ("momentum", "accumulation", "clip", "shard_all", "reference")}
    training = Training(args.kind, config, args.freezable, args.recompute, **loop)
    ranks = training.accelerator.num_processes
    result = {"kind": training.freezing.engine.kind, "world_size": ranks, "losses": training.losses}
    if args.count:
        result |= training.between_decisions()
    else:
        result |= cut(training) if args.start is None else resumed(training, args.start)
    torch.save(result, args.out / f"rank{os.environ.get('RANK', '0')}.pt")
    training.accelerator.end_training()


def cut(training: Training) -> dict[str, Any]:
    """A training with a snapshot in its middle, to which it goes back at the end, and on from there."""
    training.train(0, CUT)
    tensors, record = training.freezing.progress.snapshot()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    training.train(CUT, CONFIG.total_steps)
    found = seen(training)
    training.freezing.progress.restore(tensors, json.loads(json.dumps(record)))
    training.train(CUT, CONFIG.total_steps)
    again = training.values()
    return {
        **found,
        "snapshot": (tensors, record),
        "again": ([vars(e) for e in training.freezing.events], again, training.losses[CONFIG.total_steps :]),
        "kept": training.kept(),
        "gathers": training.gathers.count,
        "whole": training.gathers.whole,
        "sent": training.traffic.bytes,
    }


def resumed(training: Training, folder: Path) -> dict[str, Any]:
    """What another engine began."""
    tensors, record = torch.load(folder / "rank0.pt", weights_only=False)["snapshot"]
    here = tensors if training.accelerator.is_main_process else {}
    training.freezing.progress.restore(here, json.loads(json.dumps(record)))
    training.train(CUT, CONFIG.total_steps)
    return seen(training)


def seen(training: Training) -> dict[str, Any]:
    return {
        "events": [vars(event) for event in training.freezing.events],
        "losses": list(training.losses),
        "final": training.values(),
        "at_freeze": dict(training.at_freeze),
        "trainable": training.freezing.engine.trainable,
    }


if __name__ == "__main__":
    main()
