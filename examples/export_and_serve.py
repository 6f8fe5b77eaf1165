"""What was trained, for those who do not know this package: as plain LoRA, and in the weights.

    aflora train examples/reviews.yaml
    python examples/export_and_serve.py runs/reviews

does what `aflora to-lora RUN OUT` and `aflora merge RUN OUT` do, and serves both with stock PEFT and transformers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import aflora_dist  # noqa: F401  # from here on PEFT knows AFLoRA
from aflora_dist.serve.lora import to_lora
from aflora_dist.serve.merge import merge

TEXTS = ["a film of great warmth", "two hours that i will not get back"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run of two classes")
    parser.add_argument("--out", type=Path, default=Path("runs/exported"), help="must not hold anything yet")
    args = parser.parse_args()

    to_lora(args.run, args.out / "lora")
    merge(args.run, args.out / "merged")

    name = PeftConfig.from_pretrained(str(args.run / "adapter")).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(args.out / "merged")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")

    @torch.no_grad()
    def said(model: torch.nn.Module) -> torch.Tensor:
        return model.eval()(**batch).logits

    def base() -> torch.nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)

    ours = said(PeftModel.from_pretrained(base(), args.run / "adapter"))
    lora = said(PeftModel.from_pretrained(base(), args.out / "lora"))
    merged = said(AutoModelForSequenceClassification.from_pretrained(args.out / "merged"))
    torch.testing.assert_close(lora, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)
    print("AFLoRA, LoRA and the merged model say the same")

    serve = pipeline("text-classification", model=str(args.out / "merged"), device="cpu")
    for text, answer in zip(TEXTS, serve(TEXTS), strict=True):
        print(f"{answer['label']} ({answer['score']:.2f}): {text}")


if __name__ == "__main__":
    main()
