"""transformers' Trainer: one callback.

python examples/with_trainer.py
accelerate launch --config_file launch/ddp.yaml examples/with_trainer.py
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import get_peft_model
from small import encoder, reviews
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from aflora_dist import AFLoRAConfig, FreezingCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=encoder(), help="a folder or a hub id; an embedded encoder if not given")
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="examples per process and update")
    parser.add_argument("--out", default="runs/with_trainer", help="checkpoints and, in adapter/, the adapter")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = Dataset.from_list([{"text": text, "label": label} for text, label in reviews(args.examples + 256)])
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
    split = data.train_test_split(test_size=256, seed=0)

    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    model = get_peft_model(model, AFLoRAConfig(r=4, task_type="SEQ_CLS"))
    freezing = FreezingCallback(initial_epochs=0.1, final_epochs=0.5)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch,
            learning_rate=2e-2,
            warmup_steps=0.1,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_steps=10,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),  # or each of several processes would train alone
        ),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        compute_metrics=lambda said: {"accuracy": float((said.predictions.argmax(-1) == said.label_ids).mean())},
        callbacks=[freezing],
    )
    trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint, on any engine
    trainer.save_model(f"{args.out}/adapter")
    assert freezing.freezing is not None
    accuracy = trainer.state.log_history[-2]["eval_accuracy"]
    print(f"accuracy {accuracy:.3f}, {len(freezing.freezing.events)} freezes; wrote {args.out}/adapter/")


if __name__ == "__main__":
    main()
