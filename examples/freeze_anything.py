"""LoRA, or all of a model, freezes while it trains: an own loop, on any engine.

python examples/freeze_anything.py lora
python examples/freeze_anything.py pattern
accelerate launch --config_file launch/zero2.yaml examples/freeze_anything.py full
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from peft import LoraConfig, get_peft_model
from small import encoder, reviews
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aflora_dist import AdaptiveFreezing, FreezingConfig

LAYERS = ["query", "value", "intermediate.dense", "output.dense"]
# What may freeze (None: the matrices of the tuner, or else of attention and feed-forward), and how.
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    # LoRA's A and B, pair by pair, by the gradient score; when all of the lowest blocks has, backward ends above them.
    "lora": (None, {"unit": "layer", "prefix": True}),
    # Whole blocks from the bottom, which needs no score.
    "full": (None, {"unit": "block", "score": "front_to_back", "prefix": True}),
    # Whatever a regular expression matches: the feed-forward matrices of the three lowest blocks. With one number for a
    # matrix: two for each element would be as much again as Adam's.
    "pattern": (r".*\.layer\.[0-2]\.(intermediate|output)\.dense\.weight", {"granularity": "matrix"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--model", default=encoder(), help="a folder or a hub id; an embedded encoder if not given")
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32, help="examples per process and update")
    args = parser.parse_args()

    several = "WORLD_SIZE" in os.environ and not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(cpu=several and not deepspeed, kwargs_handlers=gloo if several else [])
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.batch
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def collate(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*rows, strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
        return {**batch, "labels": torch.tensor(labels)}

    loader = DataLoader(reviews(args.examples), batch_size=args.batch, shuffle=True, drop_last=True, collate_fn=collate)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    if args.what == "lora":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=LAYERS))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps, (freezable, options) = len(loader), WAYS[args.what]
    config = FreezingConfig(total_steps=steps, initial_steps=steps // 10, final_steps=steps // 4, **options)
    freezing = AdaptiveFreezing(
        accelerator,
        model,
        optimizer,
        config,
        freezable=freezable,
        on_freeze=lambda e: accelerator.print(
            f"step {e.step}: {e.trainable_params:,} elements train, {e.optimizer_state_bytes / 1e6:.1f} MB of moments, "
            f"backward ends at block {e.backward_from}"
        ),
    )

    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    left = len(freezing.remaining)
    accelerator.print(f"{len(freezing.frozen)} parameters froze; of what may freeze {left} still train")
    accelerator.end_training()


if __name__ == "__main__":
    main()
