"""A language model on word problems: before, with AFLoRA and with LoRA r=8, each at its best of several rates.

    python -m profiling.word_problems OUT --data FOLDER --launch '--config_file launch/zero2.yaml'

FOLDER holds train.jsonl (prompt, completion) and test.jsonl (prompt, answer). The last 128 training problems are held
out: rates are compared by their loss, after few problems, and the perplexity is theirs; answers are those of the test
problems. Prints a table as Markdown, which OUT/table.md holds as well; OUT/NAME are the runs' directories. The adapter
of AFLoRA is exported with `aflora to-lora` and asked the same questions in stock transformers, without this package.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RATES = {"aflora": (3e-3, 1e-2, 3e-2), "lora": (3e-4, 1e-3, 3e-3)}
LORA = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
HELD_OUT = 128


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    out: Path
    model: str
    launcher: tuple[str, ...]
    batch: int
    max_length: int
    max_new_tokens: int
    seed: int

    def run(self, name: str, method: str, rate: float, examples: int, **more: Any) -> dict[str, Any]:
        """result.json of a training of one epoch; what it prints goes to OUT/NAME.txt."""
        folder = self.out / name
        options: dict[str, Any] = {
            "run.dir": folder,
            "run.overwrite": True,
            "run.save_every": 0,
            "run.log_every": 1,
            "model.name": self.model,
            "data.task": "sft",
            "data.train_file": self.out / "train.jsonl",
            "data.validation_file": self.out / "evaluation.jsonl",
            "data.max_length": self.max_length,
            "data.max_train_examples": examples,
            "data.max_new_tokens": self.max_new_tokens,
            "data.tokens_per_micro_batch": 1024,
            "method.name": method,
            "train.epochs": 1,
            "train.batch_size": self.batch,
            "train.eval_batch_size": 32,
            "train.learning_rate": rate,
            "train.weight_decay": 0.0,
            "train.max_grad_norm": 1.0,
            "train.seed": self.seed,
            **more,
        }
        if method == "aflora":
            options |= {"freezing.initial_epochs": 0.1, "freezing.final_epochs": 0.5}
        elif method == "lora":
            options["method.options"] = json.dumps(LORA)
        command = [sys.executable, "-m", "accelerate.commands.launch", *self.launcher, "-m", "aflora_dist.training.run"]
        command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        said = self.out / f"{name}.txt"
        began = time.monotonic()
        with said.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed (exit status {done.returncode}); {said} tells why.")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        print(f"{name}: {result['metrics']} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return result

    def best_rate(self, method: str, rates: Sequence[float], examples: int) -> tuple[float, dict[float, float]]:
        """The rate with the lowest loss on held-out training problems, and all losses."""
        validation = {"data.validation_file": self.out / "held_out.jsonl"}
        losses = {
            rate: self.run(f"search_{method}_{rate:g}", method, rate, examples, **validation)["metrics"]["loss"]
            for rate in rates
        }
        finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return min(finite, key=finite.__getitem__), losses


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m profiling.word_problems", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--examples", type=int, default=2960, help="training problems of the compared runs")
    parser.add_argument("--search", type=int, default=480, help="training problems of the runs that choose a rate")
    parser.add_argument("--test", type=int, default=249, help="test problems that are answered")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--questions", type=int, default=8, help="asked of the exported adapter")
    parser.add_argument("--rates", type=json.loads, default=RATES, help='as in {"aflora": [0.01], "lora": [0.001]}')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launch", type=shlex.split, default=[], help="options of accelerate launch")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    split(args.data, args.out, args.test)
    setting = Setting(
        args.out, args.model, tuple(args.launch), args.batch, args.max_length, args.max_new_tokens, args.seed
    )
    # LoRA's B is 0 and stays so at a rate of 0: the base model, seen by the same evaluation.
    results = {"before": setting.run("before", "lora", 0.0, args.batch)}
    rates, losses = {}, {}
    for method, tried in args.rates.items():
        rates[method], losses[method] = (
            setting.best_rate(method, tried, args.search) if len(tried) > 1 else (tried[0], {})
        )
        results[method] = setting.run(method, method, rates[method], args.examples)
    table = "\n".join(report(results, rates, losses))
    if "aflora" in results:
        asked = [row["prompt"] for row in rows(args.data / "test.jsonl")[: args.questions]]
        table += f"\n\n{exported(setting, asked, args.max_new_tokens)}"
    print(table)
    (args.out / "table.md").write_text(table + "\n")
    return 0


def split(data: Path, out: Path, test: int) -> None:
    """OUT/train.jsonl, held_out.jsonl (for the loss), and evaluation.jsonl: those, and questions to be answered."""
    train = rows(data / "train.jsonl")
    told = [{"prompt": row["prompt"], "completion": row["completion"]} for row in train]
    asked = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows(data / "test.jsonl")[:test]]
    for name, found in (
        ("train", told[:-HELD_OUT]),
        ("held_out", told[-HELD_OUT:]),
        ("evaluation", told[-HELD_OUT:] + asked),
    ):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def report(
    results: Mapping[str, dict[str, Any]], rates: Mapping[str, float], losses: Mapping[str, Mapping[float, float]]
) -> list[str]:
    """The table, and what the rates came to."""
    lines = [
        "| | rate | perplexity | exact match | trainable on average | freezes | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        found = f"{result['metrics']['perplexity']:.3f} | {result['metrics']['exact_match']:.3f}"
        if name == "before":
            lines.append(f"| before | | {found} | | | |")
            continue
        seconds = f"{result['steps']} updates, {result['train_seconds']:.0f} s"
        lines.append(
            f"| {name} | {rates[name]:g} | {found} | {result['avg_trainable_params']:,.0f} | "
            f"{result['freeze_events']} | {seconds} |"
        )
    for method, by_rate in losses.items():
        if by_rate:
            said = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in by_rate.items())
            lines.append(f"\nHeld-out loss of {method} by rate: {said}.")
    return lines


_ASK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
if sys.argv[1] == "aflora":
    import aflora_dist
base, file, adapter, length, asked = json.loads(sys.argv[2])
gguf = {"gguf_file": file} if file else {}
tokenizer = AutoTokenizer.from_pretrained(base, **gguf)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **gguf)
if sys.argv[1] == "aflora":
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
else:
    model.load_adapter(adapter)
    assert "aflora_dist" not in sys.modules
model.eval()
answers = []
for prompt in asked:
    said = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        chat = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**chat, do_sample=False, max_new_tokens=length, pad_token_id=tokenizer.eos_token_id)
    answers.append(tokens[0, chat["input_ids"].shape[1]:].tolist())
print(json.dumps(answers))
"""


def exported(setting: Setting, asked: Sequence[str], length: int) -> str:
    """What the adapter says to questions, as AFLoRA and, exported, as LoRA in stock transformers; token by token."""
    from aflora_dist.tasks.model import resolve_name

    out = setting.out / "lora_export"
    if not out.exists():
        subprocess.run(
            [sys.executable, "-m", "aflora_dist.cli", "to-lora", str(setting.out / "aflora"), str(out)], check=True
        )
    name = resolve_name(setting.model, True)
    base, _, file = name.rpartition("/") if name.endswith(".gguf") else (name, "", "")
    answers = {}
    for kind, adapter in (("aflora", setting.out / "aflora" / "adapter"), ("lora", out)):
        told = json.dumps([base, file, str(adapter), length, list(asked)])
        done = subprocess.run([sys.executable, "-c", _ASK, kind, told], stdout=subprocess.PIPE, text=True, check=True)
        answers[kind] = json.loads(done.stdout.splitlines()[-1])
    same = sum(mine == theirs for mine, theirs in zip(answers["aflora"], answers["lora"], strict=True))
    tokens = sum(map(len, answers["aflora"]))
    return (
        f"Exported with `aflora to-lora` and asked {len(asked)} questions in stock transformers: {same} of "
        f"{len(asked)} answers have the same tokens ({tokens} in all)."
    )


if __name__ == "__main__":
    sys.exit(main())
