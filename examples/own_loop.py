"""An own loop, as accelerate's documentation writes it, with the three lines that freezing takes.

python examples/own_loop.py
accelerate launch --config_file launch/zero2.yaml examples/own_loop.py
"""

from __future__ import annotations

import argparse
import os

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from peft import get_peft_model
from small import encoder, reviews
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=encoder(), help="a folder or a hub id; an embedded encoder if not given")
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="examples per process and update")
    parser.add_argument("--out", default="runs/own_loop", help="the adapter's folder")
    args = parser.parse_args()

    # Several processes on CPUs talk over gloo; without this each would train alone.
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

    data = reviews(args.examples + 256)
    loader = DataLoader(data[256:], batch_size=args.batch, shuffle=True, drop_last=True, collate_fn=collate)
    held_out = DataLoader(data[:256], batch_size=args.batch, collate_fn=collate)

    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    model = get_peft_model(model, AFLoRAConfig(r=4, task_type="SEQ_CLS"))  # 1. the adapter
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, loader, held_out)
    steps = len(loader)
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    freezing = AdaptiveFreezing(  # 2. the freezing
        accelerator,
        model,
        optimizer,
        FreezingConfig(total_steps=steps, initial_steps=steps // 10, final_steps=steps // 2),
        on_freeze=lambda event: accelerator.print(f"step {event.step}: {event.remaining} matrices still train"),
    )

    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)  # 3. not torch's own function
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    model.eval()
    right = []
    for batch in held_out:
        with torch.no_grad():
            said = model(**batch).logits.argmax(-1)
        right.append(accelerator.gather_for_metrics(said == batch["labels"]))
    accelerator.print(f"accuracy {torch.cat(right).float().mean():.3f}, {len(freezing.events)} freezes")

    freezing.save_pretrained(args.out)  # on every rank
    accelerator.print(f"wrote {args.out}/")
    accelerator.end_training()


if __name__ == "__main__":
    main()
