"""transformers' Trainer with FreezingCallback: the same freezing as in a loop, and nothing learned is lost."""

from __future__ import annotations

import json
import signal
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingCallback, FreezingConfig
from aflora_dist.compat.contract import is_older
from aflora_dist.errors import DivergedError
from aflora_dist.options import FreezingKeywords
from aflora_dist.trainer import TRAINER, _introduce
from tests.launch import launch_series
from tests.test_contract import GONE
from tests.workers import trainer as worker
from tests.workers.trainer import LENGTH, STEPS, Examples, Stream, batch, build_llama, settings, values

EVERY = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
# Whose checkpoint each goes on from, besides its own and one process's: each is a source and a target.
BEFORE = {"single": "zero1", "ddp": "fsdp2", "zero1": "ddp", "zero2": "zero1", "zero3": "zero2", "fsdp2": "zero3"}
FOURTHS = {"save_strategy": "steps", "save_steps": 4}
# The first checkpoint is the best: matrices freeze after it.
BEST = {
    **FOURTHS,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}


def run(engine: str, *runs: list[str]) -> list[list[dict[str, Any]]]:
    """What every rank saw in each run: the worker's arguments, the folder first."""
    if engine == "single":
        for arguments in runs:
            worker.main(arguments)
    else:
        module = ["tests.workers.trainer"]
        if engine == "fsdp2":
            module = ["profiling.fsdp_on_cpu", *module]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
            launch_series(engine, 2, [[*module, *arguments] for arguments in runs])
    return [[torch.load(path) for path in sorted(Path(arguments[0]).glob("rank*.pt"))] for arguments in runs]


@cache
def trained(engine: str) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """A folder; what the ranks saw of a training to the end (`whole`), with the best model loaded (`best`), and `lora`.

    The last is of another method and other scores.
    """
    folder = Path(mkdtemp(prefix=f"trainer-{engine}-"))
    told = {"whole": (FOURTHS, []), "best": (BEST, []), "lora": (FOURTHS, ["--lora"])}
    runs = [[str(folder / name), "--options", json.dumps(o), *more] for name, (o, more) in told.items()]
    whole, best, lora = run(engine, *runs)
    return folder, whole, best, lora


def trainers_scale(labels: torch.Tensor) -> float:
    """What Trainer's loss of a causal language model is of the mean over the tokens that are predicted.

    Before transformers 5.10 it divides by all labels, each sequence's first among them, which nothing predicts.
    """
    counted = labels if is_older("transformers", "5.10") else labels[:, 1:]
    return float((labels[:, 1:] != -100).sum() / (counted != -100).sum())


@cache
def loop() -> list[dict[str, Any]]:
    """The freeze log of an own loop in one process, as accelerate's documentation writes it, with Trainer's loss."""
    accelerator = Accelerator(cpu=True)
    model = build_llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=worker.RATE, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / STEPS)
    config = FreezingConfig(total_steps=STEPS, initial_steps=round(0.1 * STEPS), final_steps=round(0.7 * STEPS))
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    for step in range(STEPS):
        accelerator.backward(model(**batch(step)).loss * trainers_scale(batch(step)["labels"]))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return [vars(event) for event in freezing.events]


def assert_same_log(
    mine: list[dict[str, Any]], theirs: list[dict[str, Any]], rel: float = 1e-5, since: int = 0
) -> None:
    """`since`: where it was resumed; of events before that no scores are kept."""
    assert [(e["step"], e["frozen"]) for e in mine] == [(e["step"], e["frozen"]) for e in theirs] != []
    for event, other in zip(mine, theirs, strict=True):
        if event["step"] < since:
            assert event["scores"] == {}
            continue
        assert event["scores"] == pytest.approx(other["scores"], rel=rel, abs=0)


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name].float(), rtol=tolerance, atol=tolerance), name


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def plain(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names that PEFT saves under."""
    return {name.replace(".default", ""): value for name, value in found.items()}


def marked(engines: tuple[str, ...]) -> list[Any]:
    return [pytest.param(e, marks=[] if e == "single" else pytest.mark.distributed) for e in engines]


# -- on every engine -----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", marked(EVERY))
def test_the_freeze_log_is_that_of_an_own_loop(engine: str) -> None:
    _, whole, *_ = trained(engine)
    assert {rank["kind"] for rank in whole} == {engine}
    for rank in whole:
        assert rank["steps"] == STEPS
        assert_same_log(rank["events"], loop())
    assert whole[0]["events"][-1]["remaining"] == 0


@pytest.mark.parametrize("engine", marked(EVERY))
def test_what_is_saved_is_the_whole_adapter(engine: str) -> None:
    folder, (whole, *_), *_ = trained(engine)
    for saved_in in (folder / "whole" / "model", folder / "whole" / f"checkpoint-{STEPS}"):
        assert_close(plain(whole["values"]), saved(saved_in), 0.0)
    assert plain(whole["values"]).keys() == saved(folder / "whole" / "checkpoint-4").keys()
    for found in whole["ways"].values():  # also where frozen parameters are to be left out
        assert_close(whole["values"], {name.removeprefix("module."): value for name, value in found.items()}, 0.0)


@pytest.mark.parametrize("engine", marked(EVERY))
def test_the_best_model_comes_back_though_matrices_froze_since(engine: str) -> None:
    folder, _, (best, *_), _ = trained(engine)
    checkpoint = folder / "best" / "checkpoint-4"
    assert Path(best["best"]) == checkpoint
    assert [e for e in best["events"] if e["step"] >= 4]
    assert_close(plain(best["values"]), saved(checkpoint), 0.0)
    assert_close(plain(best["values"]), saved(folder / "best" / "model"), 0.0)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", EVERY)
def test_resuming_is_exact_before_between_and_after_the_freezes(engine: str, tmp_path: Path) -> None:
    """To the bit on the same engine, and within 1e-5 from a checkpoint of one process or of another engine."""
    folder, (whole, *_), *_ = trained(engine)
    others = [trained(source)[0] for source in dict.fromkeys(("single", BEFORE[engine])) if source != engine]
    sources = [folder / "whole" / f"checkpoint-{step}" for step in (4, 8)]
    sources += [other / "whole" / "checkpoint-4" for other in others]
    since = [int(source.name.partition("-")[2]) for source in sources]
    runs = [[str(tmp_path / str(i)), "--resume", str(source)] for i, source in enumerate(sources)]
    resumed = run(engine, *runs)
    for (first, *_), at, exact in zip(resumed, since, [True, True] + [False] * len(others), strict=True):
        assert_same_log(first["events"], whole["events"], rel=1e-12 if exact else 1e-5, since=at)
        assert_close(first["values"], whole["values"], 0.0 if exact else 1e-5)
        assert first["rates"] == pytest.approx(whole["rates"][-len(first["rates"]) :], rel=1e-12)


@pytest.mark.parametrize("engine", marked(("single", "ddp", "zero3")))
def test_a_signal_to_one_rank_has_all_save_and_leave_after_the_same_update(engine: str, tmp_path: Path) -> None:
    """With transformers' own option, whose callback would save without the freezing's state, and each rank alone."""
    _, (whole, *_), *_ = trained(engine)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    options = ["--options", json.dumps({"enable_jit_checkpoint": True})]
    left, (resumed, *_) = run(
        engine,
        [str(tmp_path / "left"), *options, "--signal", "2"],
        [str(tmp_path / "resumed"), *options, "--resume", str(tmp_path / "left")],
    )
    (step,) = {rank["steps"] for rank in left}
    assert 2 < step < STEPS
    assert [path.name for path in (tmp_path / "left").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert resumed["steps"] == STEPS
    assert_same_log(resumed["events"], whole["events"], rel=1e-12, since=step)
    assert_close(resumed["values"], whole["values"], 0.0)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize("engine", marked(EVERY))
def test_lora_freezes_with_its_lowest_blocks_as_on_one_process(engine: str) -> None:
    (one, *_) = trained("single")[3]
    assert [event["backward_from"] for event in one["events"]][-1] == 1
    for rank in trained(engine)[3]:
        assert_same_log(rank["events"], one["events"], rel=1e-4)
        assert_close(rank["values"], one["values"], 2e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", EVERY)
def test_lora_goes_on_in_the_middle_of_a_prefix(engine: str, tmp_path: Path) -> None:
    """From a checkpoint of another engine."""
    (one, *_), (before, *_) = trained("single")[3], trained(BEFORE[engine])[3]
    assert [event["backward_from"] for event in before["events"] if event["step"] < 8][-1] == 1
    ((first, *_),) = run(
        engine, [str(tmp_path), "--lora", "--resume", str(trained(BEFORE[engine])[0] / "lora" / "checkpoint-8")]
    )
    assert_same_log(first["events"], one["events"], rel=1e-4, since=8)
    assert_close(first["values"], one["values"], 2e-5)


ADAMW = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
SECTIONS: dict[str, dict[str, Any]] = {  # of a DeepSpeed file, as transformers' documentation shows them
    "scheduler": {"scheduler": {"type": "WarmupLR", "params": WARMUP}},
    "optimizer": {"optimizer": {"type": "AdamW", "params": ADAMW}},
    "both": {
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "scheduler": {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": "auto"}},
    },
    "momentum, too": {  # it cycles Adam's betas against the rate
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "scheduler": {
            "type": "OneCycle",
            "params": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 5},
        },
    },
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "names"), [("zero1", ["scheduler"]), ("zero2", [*SECTIONS]), ("zero3", ["both", "momentum, too"])]
)
def test_resuming_with_deepspeed_s_own_optimizer_and_schedule_is_exact(
    engine: str, names: list[str], tmp_path: Path
) -> None:
    runs = []
    for name in names:
        file = {
            "zero_optimization": {"stage": int(engine[4]), "stage3_gather_16bit_weights_on_model_save": True},
            **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto"),
            "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True,
            **SECTIONS[name],
        }
        whole = json.dumps({**FOURTHS, "warmup_steps": 6, "deepspeed": file})
        saved = str(tmp_path / f"{name} whole" / "checkpoint-4")
        runs.append([str(tmp_path / f"{name} whole"), "--options", whole])
        runs.append([str(tmp_path / f"{name} resumed"), "--options", whole, "--resume", saved])
    found = [ranks[0] for ranks in run(engine, *runs)]
    for name, whole, resumed in zip(names, found[::2], found[1::2], strict=True):
        assert len({*whole["rates"]}) > 4, name
        assert (resumed["rates"], resumed["losses"]) == (whole["rates"], whole["losses"]), name
        assert_close(resumed["values"], whole["values"], 0.0)


def test_a_schedule_of_rates_and_betas_goes_on_to_the_bit(tmp_path: Path) -> None:
    def train(out: Path, **more: Any) -> dict[str, torch.Tensor]:
        model, callback = build_llama(), FreezingCallback()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)
        arguments = TrainingArguments(**settings(out, **FOURTHS))
        pair = (optimizer, scheduler)
        trainer = Trainer(model, arguments, train_dataset=Examples(), callbacks=[callback], optimizers=pair)
        trainer.train(**more)
        return values(callback)

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_close(resumed, whole, 0.0)


def test_no_checkpoint_of_what_is_not_finite_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    class Breaking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                next(p for p in kwargs["model"].parameters() if p.requires_grad).data.fill_(float("nan"))

    trainer = make(tmp_path, FreezingCallback(initial_epochs=2.5, final_epochs=0), **FOURTHS, save_total_limit=1)
    trainer.add_callback(Breaking())
    with pytest.raises(DivergedError, match="is not finite after step 7, so it is not saved"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.distributed
@pytest.mark.parametrize("source", ["zero3", "fsdp2"])
def test_one_process_resumes_from_a_sharded_checkpoint(source: str, tmp_path: Path) -> None:
    """accelerate #4206, transformers #28320: of such an adapter only rank 0's slice came back."""
    folder, (whole, *_), *_ = trained(source)
    ((resumed,),) = run("single", [str(tmp_path), "--resume", str(folder / "whole" / "checkpoint-4")])
    assert_same_log(resumed["events"], whole["events"], since=4)
    assert_close(resumed["values"], whole["values"], 1e-5)


@pytest.mark.parametrize("engine", marked(EVERY))
def test_the_same_trainer_resumes_from_before_its_freezes_and_trains_again(engine: str, tmp_path: Path) -> None:
    """Under DeepSpeed Trainer itself cannot train twice."""
    _, (whole, *_), *_ = trained(engine)
    ((first, *_),) = run(engine, [str(tmp_path), "--options", json.dumps(FOURTHS), "--again"])
    events, resumed = first["resumed"]
    assert_same_log(events, whole["events"], rel=1e-12, since=4)
    assert_close(resumed, whole["values"], 0.0)
    assert first["again"] == ([], STEPS)


def test_the_same_trainer_resumes_from_before_its_lowest_block_froze_whole(tmp_path: Path) -> None:
    """What froze besides matrices trains again, and embeddings' outputs are as they were."""
    (one, *_) = trained("single")[3]
    ((first, *_),) = run("single", [str(tmp_path), "--options", json.dumps(FOURTHS), "--lora", "--again"])
    events, resumed = first["resumed"]
    assert_same_log(events, one["events"], rel=1e-12, since=4)
    assert_close(resumed, one["values"], 0.0)


# -- ways of using Trainer, in one process -----------------------------------------------------------


def make(out: Path, callback: TrainerCallback | None, model: Any = None, data: Any = None, **options: Any) -> Trainer:
    return Trainer(
        model=model or build_llama(),
        args=TrainingArguments(**settings(out, **options)),
        train_dataset=data or Examples(),
        eval_dataset=Examples() if "eval_strategy" in options else None,
        callbacks=[callback] if callback else None,
    )


@pytest.mark.parametrize("how", ["in the constructor", "its class", "added", "with its trainer"])
def test_the_callback_works_wherever_it_is_put(how: str, tmp_path: Path) -> None:
    if how == "its class":
        trainer = make(tmp_path, FreezingCallback)  # type: ignore[arg-type]
    elif how == "in the constructor":
        trainer = make(tmp_path, FreezingCallback())
    else:
        trainer = make(tmp_path, None)
        trainer.add_callback(FreezingCallback(trainer) if how == "with its trainer" else FreezingCallback())
    trainer.train()
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, FreezingCallback))
    assert callback.freezing is not None
    assert_same_log([vars(e) for e in callback.freezing.events], loop())


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, FreezingCallback())
    trainer.add_callback(FreezingCallback())
    with pytest.raises(AFLoRAError, match="2 FreezingCallbacks"):
        trainer.train()


def test_a_stream_with_max_steps_freezes_like_a_dataset(tmp_path: Path) -> None:
    callback = FreezingCallback()
    make(tmp_path, callback, data=Stream(), max_steps=STEPS).train()
    assert callback.freezing is not None
    assert_same_log([vars(e) for e in callback.freezing.events], loop())


def test_halves_of_an_odd_number_of_updates_make_a_whole(tmp_path: Path) -> None:
    callback = FreezingCallback(initial_epochs=1.5, final_epochs=1.5)
    make(tmp_path, callback, per_device_train_batch_size=10).train()  # 3 epochs of 5 updates
    assert callback.freezing is not None
    config = callback.freezing.config
    assert (config.total_steps, config.initial_steps, config.final_steps) == (15, 8, 7)


@pytest.mark.parametrize(("accumulation", "updates"), [(2, 3), (64, 1)])
def test_epochs_have_as_many_updates_however_their_number_is_said(
    accumulation: int, updates: int, tmp_path: Path
) -> None:
    """The odd rest of five batches is an update, too."""
    options = {"per_device_train_batch_size": 10, "gradient_accumulation_steps": accumulation}
    for said in ({"num_train_epochs": 6}, {"max_steps": 6 * updates}):
        callback = FreezingCallback(initial_epochs=2, final_epochs=1)
        make(tmp_path, callback, **options, **said).train()
        assert callback.freezing is not None
        config = callback.freezing.config
        assert (config.total_steps, config.initial_steps, config.final_steps) == (6 * updates, 2 * updates, updates)


def test_a_training_of_no_epoch_freezes_nothing(tmp_path: Path) -> None:
    callback = FreezingCallback()
    make(tmp_path, callback, num_train_epochs=0).train()
    assert callback.freezing is None


WRONG: dict[str, dict[str, Any]] = {
    "initial_epochs must be a finite number": {"initial_epochs": float("nan")},
    "initial_epochs must be a number, got '1'": {"initial_epochs": "1"},
    "final_epochs must not be negative": {"final_epochs": -1},
    "prefix_epochs must not be negative": {"prefix_epochs": -5, "prefix": True},
    "prefix_epochs is for prefix=true": {"prefix_epochs": 1},
    "beta1 must be less than 1": {"beta1": 1.0},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_callback_s_options_are_refused_when_it_is_made(said: str) -> None:
    with pytest.raises(AFLoRAError, match=f"^{said}"):
        FreezingCallback(**WRONG[said])


def test_a_schedule_that_does_not_fit_is_said_in_the_callback_s_own_words(tmp_path: Path) -> None:
    said = r"initial_epochs \+ final_epochs, by default 70% of the training = 1 \+ 1.4, but the training has 2 epochs"
    with pytest.raises(AFLoRAError, match=said):
        make(tmp_path, FreezingCallback(initial_epochs=1), num_train_epochs=2).train()


class Normed(torch.nn.Module):
    """Of what a checkpoint holds, statistics of batches do not train, and in `fixed` nothing does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fixed, self.down, self.up = (torch.nn.Linear(LENGTH, LENGTH) for _ in range(3))
        self.norm, self.head = torch.nn.BatchNorm1d(LENGTH), torch.nn.Linear(LENGTH, 2)
        self.fixed.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        hidden = self.up(self.norm(self.down(self.fixed(input_ids.float()))).relu())
        return {"loss": torch.nn.functional.cross_entropy(self.head(hidden), labels[:, 0] % 2)}


def test_what_does_not_train_and_is_saved_comes_back_too(tmp_path: Path) -> None:
    def trained(resume: int | None, seed: int, **options: Any) -> tuple[dict[str, torch.Tensor], Trainer]:
        callback = FreezingCallback(freezable=["down.weight", "up.weight"], final_epochs=1)
        trainer = make(tmp_path, callback, Normed(seed), **FOURTHS | options)
        trainer.train(resume_from_checkpoint=None if resume is None else str(tmp_path / f"checkpoint-{resume}"))
        return dict(trainer.model.state_dict()), trainer

    whole, _ = trained(None, seed=0)
    again, _ = trained(8, seed=1)
    assert [name for name, value in again.items() if not torch.equal(value, whole[name])] == []
    best, trainer = trained(None, seed=2, **BEST)
    chosen = load_file(Path(str(trainer.state.best_model_checkpoint)) / "model.safetensors")
    assert "norm.running_mean" in chosen
    assert [name for name, value in best.items() if not torch.equal(value, chosen[name])] == []


def test_a_second_training_goes_on_where_a_lowest_block_waits_for_its_rest(tmp_path: Path) -> None:
    """All of its matrices have frozen, and its vectors were not yet allowed to."""

    class Early(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 5

    callback = FreezingCallback(
        score="front_to_back", prefix=True, initial_epochs=0.5, final_epochs=0.25, prefix_epochs=0
    )
    trainer = make(tmp_path, callback)
    trainer.add_callback(early := Early())
    trainer.train()
    assert callback.freezing is not None
    frozen = {name for event in callback.freezing.events for name in event.frozen}
    assert {name.rpartition(".")[2] for name in frozen} == {"A", "B"}
    assert all(name in frozen for name in frozen | {*callback.freezing.freezable} if ".layers.0." in name)
    trainer.remove_callback(early)
    trainer.train()
    assert {event.backward_from for event in callback.freezing.events} >= {1}


def test_a_random_order_is_that_of_the_training_s_seed(tmp_path: Path) -> None:
    orders = []
    for seed, said in ((5, {}), (6, {}), (6, {"seed": 5})):
        callback = FreezingCallback(score="random", **said)
        make(tmp_path, callback, seed=seed).train()
        assert callback.freezing is not None
        orders.append([name for event in callback.freezing.events for name in event.frozen])
    assert orders[0] == orders[2] != orders[1]


def test_every_option_of_freezing_can_be_said(tmp_path: Path) -> None:
    said: FreezingKeywords = {"beta1": 0.5, "beta2": 0.6, "score": "relative", "unit": "layer", "every": 2}
    said |= {"granularity": "matrix", "seed": 3, "threshold": 0.25, "prefix": True, "pairwise": False, "rule": "rank"}
    callback = FreezingCallback(**said, shape="quadratic", prefix_epochs=0)  # or nothing would train in the end
    make(tmp_path, callback, max_steps=4).train()
    assert callback.freezing is not None
    assert callback.freezing.config.keywords(0) == {**said, "shape": "quadratic"}
    assert FreezingCallback(rule="quantile").options.rule == "quantile"
    with pytest.raises(AFLoRAError, match=r"unit must be one of matrix, layer, block, got None"):
        FreezingCallback(unit=None)  # type: ignore[arg-type]
    with pytest.raises(AFLoRAError, match=r"beta1 must be less than 1, got 1\.0"):
        FreezingCallback(beta1=1.0)


def test_training_again_goes_on_with_what_is_frozen(tmp_path: Path) -> None:
    callback = FreezingCallback()
    trainer = make(tmp_path, callback)
    trainer.train()
    first = values(callback)
    for again in (trainer, make(tmp_path, other := FreezingCallback(), model=trainer.model)):
        again.train()
    assert other.freezing is not None
    assert (other.freezing.events, other.freezing.step) == ([], STEPS)
    second = values(other)
    changed = {name.rpartition(".")[2] for name, value in first.items() if not torch.equal(value, second[name])}
    assert changed == {"s_d", "s_b"}


@pytest.mark.parametrize("at", [2, STEPS - 1])
def test_an_out_of_memory_is_retried_whenever_it_comes(
    at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(TrainerCallback):
        full = True

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.full and state.global_step == at:
                self.full = False
                raise RuntimeError("CUDA out of memory.")

    callback = FreezingCallback()
    trainer = make(tmp_path, callback, auto_find_batch_size=True)
    trainer.add_callback(Full())
    trainer.train()
    assert callback.freezing is not None
    assert trainer._train_batch_size < worker.BATCH
    assert trainer.state.global_step == callback.freezing.step
    assert (callback.freezing.events == []) == (at == STEPS - 1)
    assert callback.freezing.remaining == []
    assert "training ended after" not in capsys.readouterr().err  # it did not


def test_a_checkpoint_that_cannot_be_gone_on_from_says_why(tmp_path: Path) -> None:
    trainer = make(tmp_path, FreezingCallback(), **FOURTHS)
    trainer.train()
    last = Path(get_last_checkpoint(str(tmp_path)))
    state = last / "aflora" / f"step_{STEPS:08d}" / "state.safetensors"
    with pytest.raises(AFLoRAError, match="initial_steps is 1 there and 3 here"):
        make(tmp_path, FreezingCallback(initial_epochs=0.75)).train(resume_from_checkpoint=True)
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(AFLoRAError, match=r"damaged: state.safetensors has .* Take another checkpoint"):
        make(tmp_path, FreezingCallback()).train(resume_from_checkpoint=True)
    (state.parent / "training.json").unlink()
    state.unlink()
    (state.parent / "manifest.json").unlink()
    state.parent.rmdir()
    with pytest.raises(AFLoRAError, match="holds no state of freezing"):
        make(tmp_path, FreezingCallback()).train(resume_from_checkpoint=True)


def test_a_compiled_model_freezes_the_same(tmp_path: Path) -> None:
    torch._dynamo.reset()
    callback = FreezingCallback()
    make(tmp_path, callback, torch_compile=True, torch_compile_backend="aot_eager").train()
    assert callback.freezing is not None
    assert_same_log([vars(e) for e in callback.freezing.events], loop(), rel=1e-4)


def test_a_transformers_without_these_places_is_an_error_that_names_the_release() -> None:
    TRAINER.append(GONE)
    try:
        with pytest.raises(AFLoRAError, match=r"has no Somebody\._moved_elsewhere.*transformers 5"):
            _introduce()
    finally:
        TRAINER.remove(GONE)
