"""A language model trains, on every engine, what a plain loop over whole global batches trains; and is measured."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import set_seed

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingConfig
from aflora_dist.methods.aflora import AFLoRA
from aflora_dist.tasks.model import load_language_model
from aflora_dist.tasks.sft.rehearsal import check_packing
from aflora_dist.training.command_line import parse
from aflora_dist.training.run import main
from tests.launch import ENGINES, launch_series
from tests.runs import command_line, lines, start_all, weights
from tests.small_lm import make_small_language_model, write_problems

BATCH, EPOCHS, PER_EPOCH = 12, 2, 3
SCHEDULE = FreezingConfig(total_steps=EPOCHS * PER_EPOCH, initial_steps=2, final_steps=1)
RATE, NORM, NEW_TOKENS = 1e-2, 0.5, 6
CASES: dict[str, dict[str, Any]] = {
    "one micro-batch": {"data.tokens_per_micro_batch": 100_000},
    "three micro-batches": {"data.tokens_per_micro_batch": 100_000, "train.accumulation": 3},
    "packed": {"data.packing": True, "data.tokens_per_micro_batch": 100_000, "train.accumulation": 2},
    "a budget of tokens": {"data.tokens_per_micro_batch": 150},
    "checkpointed": {"train.gradient_checkpointing": True, "data.tokens_per_micro_batch": 300},
}
PLACES = [("single", 1), *((engine, ranks) for engine in (*ENGINES, "fsdp2") for ranks in (2, 3))]


def cases(ranks: int) -> list[str]:
    """On one process all, on two ranks and on three three of them each."""
    return list(CASES)[{1: slice(None), 2: slice(2, None), 3: slice(3)}[ranks]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_language_model(tmp_path_factory.mktemp("small_lm"))


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl (3 batches and 4 rows) and dev.jsonl (13 rows, three of them without a completion)."""
    folder = tmp_path_factory.mktemp("problems")
    write_problems(folder / "train.jsonl", PER_EPOCH * BATCH + 4, seed=0)
    write_problems(folder / "dev.jsonl", 13, seed=1, answered_only=3)
    return folder


def arguments(run: Path, model: Path, problems: Path, **more: Any) -> list[str]:
    chosen = {
        "run.dir": run,
        "run.log_every": 1,
        "run.save_every": 0,
        "model.name": model,
        "data.task": "sft",
        "data.train_file": problems / "train.jsonl",
        "data.validation_file": problems / "dev.jsonl",
        "data.max_length": 96,
        "data.max_new_tokens": NEW_TOKENS,
        "train.epochs": EPOCHS,
        "train.batch_size": BATCH,
        "train.eval_batch_size": 4,
        "train.learning_rate": RATE,
        "train.warmup_ratio": 0,
        "train.max_grad_norm": NORM,
        "freezing.initial_epochs": SCHEDULE.initial_steps / PER_EPOCH,
        "freezing.final_epochs": SCHEDULE.final_steps / PER_EPOCH,
        **more,
    }
    return command_line(chosen)


Dealt = Callable[[str, int], dict[str, Path]]


@pytest.fixture(scope="module")
def dealt(model: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Dealt:
    """(engine, ranks) -> directory of the main job by case."""

    @functools.cache
    def run(engine: str, ranks: int) -> dict[str, Path]:
        folders = {case: tmp_path_factory.mktemp("dealt") / "run" for case in cases(ranks)}
        jobs = [
            arguments(folder, model, problems, **{"run.tensorboard": False}, **CASES[case])
            for case, folder in folders.items()
        ]
        if engine == "single":
            start_all("single", jobs)
        else:
            worker = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
                launch_series(engine, ranks, [[*worker, "aflora_dist.training.run", *job] for job in jobs])
        return folders

    return run


@pytest.fixture(scope="module")
def plain(model: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same training in a loop of its own: an example at a time, plain logits, the sum over all by their number."""
    config, _ = parse(arguments(Path("unused"), model, problems))
    set_seed(0)
    base, tokenizer = load_language_model(config.model)
    accelerator = Accelerator(cpu=True)
    prepared = AFLoRA(config).adapt(base, [])
    trained = [p for p in prepared.parameters() if p.requires_grad]
    prepared, optimizer = accelerator.prepare(prepared, torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1))
    freezing = AdaptiveFreezing(accelerator, prepared, optimizer, SCHEDULE)
    total = EPOCHS * PER_EPOCH
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda t: (total - t) / total)

    def read(name: str) -> list[tuple[list[int], list[int], int]]:
        rows = [json.loads(line) for line in (problems / name).read_text().splitlines()]
        found = []
        for row in rows:
            prompt = tokenizer(f"<s>### Instruction:\n{row['prompt']}\n\n### Response:\n")["input_ids"]
            said = [] if row["completion"] is None else tokenizer(f"{row['completion']}</s>")["input_ids"]
            found.append((prompt, said, row["answer"]))
        return found

    def sum_of(prompt: list[int], said: list[int]) -> tuple[torch.Tensor, int]:
        ids = [*prompt, *said, *tokenizer("\n\n")["input_ids"]][:96]
        logits = prepared(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : len(prompt) + len(said) - 1]
        said = ids[len(prompt) : len(prompt) + len(said)]
        return F.cross_entropy(logits[: len(said)], torch.tensor(said), reduction="sum"), len(said)

    rows, losses, norms = read("train.jsonl"), [], []
    sizes = sorted(len(said) for _, said, _ in rows)
    assert 5 * sizes[0] < sizes[-1]
    for epoch in range(EPOCHS):
        prepared.train()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, PER_EPOCH * BATCH, BATCH):
            sums, counts = zip(*(sum_of(*rows[i][:2]) for i in order[start : start + BATCH]), strict=True)
            loss = torch.stack(sums).sum() / sum(counts)
            accelerator.backward(loss)
            norms.append(float(accelerator.clip_grad_norm_(prepared.parameters(), NORM)))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
    prepared.eval()
    dev, right = read("dev.jsonl"), 0
    with torch.no_grad():
        sums, counts = zip(*(sum_of(prompt, said) for prompt, said, _ in dev if said), strict=True)
        for prompt, _, answer in dev:
            said = prepared.generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
            numbers = [p for p in tokenizer.decode(said[0, len(prompt) :]).split() if p.isdigit()]
            right += bool(numbers) and int(numbers[-1]) == answer
    folder = tmp_path_factory.mktemp("plain")
    prepared.save_pretrained(str(folder / "adapter"))
    loss = float(sum(sums)) / sum(counts)
    metrics = {"exact_match": right / len(dev), "loss": loss, "perplexity": math.exp(loss)}
    return {"losses": losses, "norms": norms, "events": freezing.events, "weights": weights(folder), "metrics": metrics}


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "ranks"), PLACES)
def test_the_loss_is_the_mean_over_the_global_batch_s_tokens(
    engine: str, ranks: int, dealt: Dealt, plain: dict[str, Any]
) -> None:
    for case, run in dealt(engine, ranks).items():
        result = json.loads((run / "result.json").read_text())
        assert (result["engine"], result["world_size"], result["steps"]) == (engine, ranks, EPOCHS * PER_EPOCH)
        metrics = lines(run, "metrics.jsonl")
        assert {line["head_lr"] for line in metrics} == {None}
        assert [line["loss"] for line in metrics] == pytest.approx(plain["losses"], abs=1e-5), case
        assert [line["grad_norm"] for line in metrics] == pytest.approx(plain["norms"], rel=1e-4), case
        log = lines(run, "freeze_log.jsonl")
        assert [(e["step"], e["frozen"]) for e in log] == [(e.step, list(e.frozen)) for e in plain["events"]], case
        assert len(log) >= 3
        learned = weights(run)
        assert learned.keys() == plain["weights"].keys()
        for name, value in learned.items():
            torch.testing.assert_close(
                value, plain["weights"][name], rtol=0, atol=1e-5, msg=lambda m, at=f"{case}, {name}": f"{at}: {m}"
            )
        assert result["metrics"] == pytest.approx(plain["metrics"], rel=1e-5), case


def test_samples_and_charts_are_shown(model: Path, problems: Path, tmp_path: Path) -> None:
    done = start_all("single", [arguments(tmp_path / "run", model, problems)])
    assert "exact_match" in done[0]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"eval/exact_match", "eval/loss", "eval/perplexity"} <= set(events.Tags()["scalars"])
    assert "samples/text_summary" in events.Tags()["tensors"]
    assert main(["--run.dir", str(tmp_path / "none"), "--data.task", "sft"]) == 2


def test_a_language_model_s_training_resumes_to_the_bit(model: Path, problems: Path, tmp_path: Path) -> None:
    more = {"run.save_every": 4, "run.tensorboard": False, "data.packing": True, "data.tokens_per_micro_batch": 200}
    whole, cut = (arguments(tmp_path / name, model, problems, **more) for name in ("whole", "cut"))
    saved = tmp_path / "whole" / "checkpoints" / "step_00000004"  # in the middle of an epoch
    start_all("single", [whole, [*cut, "--resume", str(saved)]])
    losses = [[line["loss"] for line in lines(tmp_path / name, "metrics.jsonl")] for name in ("whole", "cut")]
    assert losses[1] == losses[0][4:]
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "precision", "dtype"),
    [("ddp", "bf16", None), ("zero3", "bf16", "bfloat16"), ("fsdp2", "bf16", "bfloat16"), ("zero2", "fp16", None)],
)
def test_half_precision_trains_alike_and_goes_on_to_the_bit(
    engine: str, precision: str, dtype: str | None, model: Path, problems: Path, dealt: Dealt, tmp_path: Path
) -> None:
    """Computed in half precision, and with `dtype` held in it, too; fp16 with DeepSpeed's loss scale."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = {"run.tensorboard": False, "run.save_every": 4, "data.tokens_per_micro_batch": 100_000}
    more |= {} if dtype is None else {"model.dtype": dtype}
    saved = str(whole / "checkpoints" / "step_00000004")
    jobs = [arguments(whole, model, problems, **more), [*arguments(cut, model, problems, **more), "--resume", saved]]
    worker = [*(["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []), "tests.workers.half"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
        launch_series(engine, 2, [[*worker, *job] for job in jobs], mixed_precision=precision)
    float32 = dealt("single", 1)["one micro-batch"]
    losses = {folder: [line["loss"] for line in lines(folder, "metrics.jsonl")] for folder in (whole, cut, float32)}
    assert losses[cut] == losses[whole][4:]
    counts = {f: [(e["step"], len(e["frozen"])) for e in lines(f, "freeze_log.jsonl")] for f in (whole, float32)}
    assert json.loads((whole / "result.json").read_text())["mixed_precision"] == precision
    if precision == "bf16":  # fp16 skips updates until its scale fits
        assert losses[whole] == pytest.approx(losses[float32], rel=2e-2)
        assert counts[whole] == counts[float32]
    assert all(math.isfinite(loss) for loss in losses[whole])
    mine, theirs = weights(cut), weights(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_packing_is_refused_where_examples_would_attend_to_each_other(
    model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def blind(*_: Any) -> None:
        """What a model does that makes its own masks."""

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", blind)
    assert main(arguments(tmp_path / "run", model, problems, **{"data.packing": True})) == 2
    assert "data.packing does not work with LlamaForCausalLM and its attention sdpa" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    flash: Any = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    with pytest.raises(AFLoRAError, match="Use sdpa, eager or flex_attention"):
        check_packing(flash, flash, torch.arange(8).unsqueeze(0))
