"""Several adapters on one model: trained one after the other, switched, and mixed in one batch.

python examples/several_adapters.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from small import encoder, reviews
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig

TASKS = {"praise": lambda text, label: label, "long": lambda text, label: int(len(text) > 100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=encoder(), help="a folder or a hub id; an embedded encoder if not given")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    config = AFLoRAConfig(r=4, task_type="SEQ_CLS")
    model = get_peft_model(model, config, adapter_name="praise")
    model.add_adapter("long", config)

    data = reviews(16 * args.steps + 4)

    def batch(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        return tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")

    for name, wanted in TASKS.items():
        model.set_adapter(name)  # the others are left alone: they neither train nor compute
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        schedule = FreezingConfig(total_steps=args.steps, initial_steps=args.steps // 8, final_steps=args.steps // 2)
        freezing = AdaptiveFreezing(accelerator, prepared, optimizer, schedule)
        prepared.train()
        for step in range(args.steps):
            rows = data[16 * step : 16 * step + 16]
            loss = prepared(**batch(rows), labels=torch.tensor([wanted(*row) for row in rows])).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        print(f"{name}: {len(freezing.frozen)} matrices froze, loss {loss.item():.3f}")
        freezing.detach()

    # One batch, an adapter for each of its texts; the same as each adapter alone.
    model.eval()
    rows = data[-4:]
    names = ["praise", "long", "praise", "long"]
    with torch.no_grad():
        mixed = model(**batch(rows), adapter_names=names).logits
        for i, name in enumerate(names):
            model.set_adapter(name)
            alone = model(**batch(rows)).logits[i]
            torch.testing.assert_close(mixed[i], alone, rtol=1e-4, atol=1e-4)
            print(f"{name}: {mixed[i].argmax().item()}  {rows[i][0][:60]}")


if __name__ == "__main__":
    main()
