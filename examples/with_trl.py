"""TRL's supervised fine-tuning: the same callback. Needs pip install trl.

python examples/with_trl.py
sbatch launch/slurm/gpu.sbatch examples/with_trl.py     # started again it goes on from its last checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from small import language_model, problems
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from aflora_dist import AFLoRAConfig, FreezingCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub id; an embedded language model if not given")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="examples per process and update")
    parser.add_argument("--save-every", type=int, default=8, help="updates between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/with_trl", help="checkpoints and, in adapter/, the adapter")
    args = parser.parse_args()

    name, file = args.model, {}
    if name is None:  # one GGUF file, whose weights transformers dequantises
        path = Path(language_model())
        name, file = str(path.parent), {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(name, **file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32", **file)
    model.is_quantized = False  # Trainer takes a GGUF file's weights to be so, which were dequantised as they were read
    model = get_peft_model(model, AFLoRAConfig(r=8, task_type="CAUSAL_LM"))

    freezing = FreezingCallback(initial_epochs=0.1, final_epochs=0.5)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.out,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-2,
            max_length=64,
            logging_steps=4,
            save_steps=args.save_every,
            enable_jit_checkpoint=True,  # save and leave when Slurm says so
            seed=args.seed,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),  # or each of several processes would train alone
            bf16=False,
        ),
        train_dataset=Dataset.from_list(problems(args.examples)),
        processing_class=tokenizer,
        callbacks=[freezing],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out) if Path(args.out).is_dir() else None)
    if trainer.state.global_step < trainer.state.max_steps:
        print(f"asked to stop: saved after update {trainer.state.global_step}; started again it goes on from there")
        return
    trainer.save_model(f"{args.out}/adapter")
    assert freezing.freezing is not None
    print(f"{len(freezing.freezing.events)} freezes; wrote {args.out}/adapter/")


if __name__ == "__main__":
    main()
