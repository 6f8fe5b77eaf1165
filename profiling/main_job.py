"""The main job on a model and data made up on the spot: no hub, no package with data.

    python -m profiling.main_job FOLDER [options of accelerate launch ...]

FOLDER/run is the run's directory. The model (BERT-base's shape, random weights) and the texts (up to 126 random
words, the label says whether most are of the vocabulary's upper half) lie beside FOLDER, for the next call to use.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = 2000


def main(argv: list[str] | None = None) -> int:
    """Train and return the exit status of `accelerate launch`."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.main_job", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128, help="examples per rank and update")
    parser.add_argument("--updates", type=int, default=16, help="per epoch, of which there are three")
    parser.add_argument("--num_processes", type=int, default=1)
    args, launcher = parser.parse_known_args(argv)
    batch = args.batch * args.num_processes
    inputs = args.folder.parent / f"inputs_{args.layers}_layers_{batch * args.updates}"
    if not inputs.exists():
        make(inputs, args.layers, batch * args.updates)
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
    command += ["--num_processes", str(args.num_processes), "-m", "aflora_dist.training.run"]
    options = {
        "run.dir": args.folder / "run",
        "run.overwrite": "true",
        "run.save_every": 0,
        "model.name": inputs / "model",
        "data.task": "files",
        "data.train_file": inputs / "train.csv",
        "data.validation_file": inputs / "dev.csv",
        "data.max_length": 128,
        "train.epochs": 3,
        "train.batch_size": batch,
        "train.learning_rate": 1e-3,
        "train.head_learning_rate": 1e-3,
    }
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode


def make(inputs: Path, layers: int, examples: int) -> None:
    """A model without trained weights, its tokenizer, train.csv and dev.csv; nothing half-made is left."""
    making = inputs.with_suffix(".making")
    (making / "model").mkdir(parents=True, exist_ok=True)
    words = [f"w{n}" for n in range(WORDS)]
    (making / "model" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(making / "model" / "vocab.txt")).save_pretrained(making / "model")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=5 + WORDS, num_hidden_layers=layers)).save_pretrained(making / "model")
    chance = random.Random(0)
    for file, rows in (("train.csv", examples), ("dev.csv", 64)):
        with (making / file).open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["text", "label"])
            for _ in range(rows):
                chosen = chance.choices(range(WORDS), k=chance.randint(16, 126))
                label = sum(chosen) * 2 > len(chosen) * WORDS
                writer.writerow([" ".join(words[n] for n in chosen), "high" if label else "low"])
    making.rename(inputs)


if __name__ == "__main__":
    sys.exit(main())
