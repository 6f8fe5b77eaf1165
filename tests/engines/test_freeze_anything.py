"""What is not AFLoRA's freezes as exactly: PEFT's LoRA and full fine-tuning, on every engine."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, get_peft_model
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingCallback, FreezingConfig
from aflora_dist.compat.contract import is_older
from aflora_dist.compat.transformers import checkpoint_activations
from tests.launch import launch_series
from tests.loop import Loop
from tests.selection import is_chosen
from tests.workers.anything import CONFIG, CUT, Training, build, create_optimizer, tensors_of
from tests.workers.tiny import build_base, global_batch

LOWEST = {"prefix": True, "prefix_steps": 0, "score": "front_to_back", "final_steps": 3}
SIZES = {"lora": 20, "full": 12, "by pattern": 10}
# What tests/workers/anything.py is told.
KINDS: dict[str, list[str]] = {
    "lora": ["lora"],
    "full": ["full"],
    "by pattern": ["full", "--freezable", r'".*\\.LayerNorm\\.(weight|bias)"'],
    "one block, recomputed": ["aflora", "--recompute", "--freezing", json.dumps(LOWEST)],
}
KINDS |= {
    name: [kind, *more, "--freezing", json.dumps(options)]
    for name, (kind, more, options) in {
        "experts": ("experts", ["--shard-all"], {}),
        "one block": ("aflora", ["--shard-all"], LOWEST),
        "one block of deberta": ("deberta", [], {**LOWEST, "unit": "block"}),
        "change": ("aflora", ["--shard-all"], {"score": "change"}),
        "random": ("lora", ["--accumulation", "2"], {"score": "random", "seed": 3}),
        "layers by number": ("lora", [], {"score": "front_to_back", "unit": "layer"}),
        "means": ("full", ["--clip", "0.1"], {"granularity": "matrix"}),
        "means of blocks": ("lora", [], {"granularity": "matrix", "score": "sensitivity", "unit": "block"}),
        "fallen": ("lora", [], {"rule": "threshold", "threshold": 0.97, "final_steps": 0}),
        "momentum": ("full", ["--momentum"], {"unit": "block"}),
        "prefix": ("aflora", [], {"prefix": True, "prefix_steps": 2, "score": "front_to_back"}),
        "prefix of all": ("full", [], {"prefix": True, "prefix_steps": 3, "unit": "block", "score": "front_to_back"}),
        "beside a reference": ("lora", ["--reference", "--recompute", "--clip", "0.05"], {}),
    }.items()
}
GO_ON = ("means", "fallen", "momentum", "prefix of all")  # what each engine goes on with where the one before was cut
RANKS = {"ddp": 3, "zero1": 2, "zero2": 3, "zero3": 2, "fsdp2": 3}
BEFORE = dict(zip([*RANKS, "single"], ["single", *RANKS], strict=True))
EVERYWHERE = ("lora", "full", "one block", "means")  # the other kinds each on two engines, and on one process
SHARDED = ("experts",)  # on those that shard something
ELSEWHERE = [kind for kind in KINDS if kind not in EVERYWHERE + SHARDED]
EARLY = {"total_steps": 40, "initial_steps": 30, "final_steps": 5}
COUNTED = {
    name: ["full", "--count", "--freezing", json.dumps({**EARLY, **options})]
    for name, options in {"by element": {}, "means": {"granularity": "matrix"}, "an order": {"score": "random"}}.items()
}


def kinds_of(engine: str) -> list[str]:
    if engine == "single":
        return list(KINDS)
    at = [*RANKS].index(engine)
    sharded = SHARDED if engine in ("zero2", "zero3", "fsdp2") else ()
    some = [kind for number, kind in enumerate(ELSEWHERE) if (number - at) % len(RANKS) in (0, 2)]
    return [*EVERYWHERE, *sharded, *some]


def pairs(engines: Iterable[str], kinds: Iterable[str] = KINDS) -> Any:
    known = [(engine, kind) for engine in engines for kind in kinds if kind in kinds_of(engine)]
    return pytest.mark.parametrize(("engine", "kind"), known)


def goes_on(engine: str) -> list[str]:
    return [kind for kind in GO_ON if kind in kinds_of(BEFORE[engine])]


@functools.cache
def needed() -> set[tuple[str, str]]:
    """(engine, kind) of all that the tests look at that are run."""
    found: set[tuple[str, str]] = set()

    def ask(test: Any, parameters: str, *looked_at: tuple[str, str]) -> None:
        if is_chosen(f"tests/engines/test_freeze_anything.py::{test.__name__}{parameters}"):
            found.update(looked_at)

    for engine in BEFORE:
        for kind in KINDS:
            here, one, said = (engine, kind), ("single", kind), f"[{engine}-{kind}]"
            ask(test_ranks_freeze_what_one_process_does, said, here, one)
            ask(test_what_is_frozen_stays_and_a_snapshot_goes_on_to_the_bit, said, here)
            ask(test_below_the_first_block_that_trains_nothing_is_kept_and_nothing_runs_backward, said, here)
            before = ((BEFORE[engine], kind), (engine, f"go on, {kind}"))
            ask(test_an_engine_goes_on_where_another_one_was_cut, said, one, *before)
        counts = ((engine, f"count {kind}") for kind in COUNTED)
        ask(test_between_decisions_nothing_is_sent_and_only_elements_scores_are_kept, f"[{engine}]", *counts)
    lora = (("single", "lora"), (BEFORE["fsdp2"], "lora"))
    left_out = (("fsdp2", "replicated"), ("fsdp2", "go on, replicated"))
    ask(test_what_is_left_out_of_the_sharding_goes_on_from_another_engine_and_to_the_bit, "", *lora, *left_out)
    for engine in RANKS:
        blocks = ((engine, "change"), (engine, "one block"))
        ask(test_a_backward_pass_that_ends_early_gathers_nothing_below, f"[{engine}]", *blocks)
    return found


@functools.cache
def run(engine: str) -> dict[str, list[dict[str, Any]]]:
    """What each rank saw of each kind; of those of `GO_ON` from where another engine was cut, too; and counts."""
    told = KINDS | {f"count {kind}": arguments for kind, arguments in COUNTED.items()}
    told["replicated"] = [*KINDS["lora"], "--replicated"]
    told = {kind: arguments for kind, arguments in told.items() if (engine, kind) in needed()}
    with tempfile.TemporaryDirectory() as out:
        for kind in GO_ON:
            if (engine, f"go on, {kind}") in needed() and engine != "single":
                told[f"go on, {kind}"] = going_on(engine, kind, Path(out))
        if (engine, "go on, replicated") in needed():
            told["go on, replicated"] = [*going_on(engine, "lora", Path(out)), "--replicated"]
        return launched(engine, told, Path(out))


def going_on(engine: str, kind: str, out: Path) -> list[str]:
    """What to tell the worker to go on with a kind, having written where it was cut."""
    (folder := out / f"{kind} until then").mkdir()
    torch.save(run(BEFORE[engine])[kind][0], folder / "rank0.pt")
    return [*KINDS[kind], "--from", str(folder)]


def launched(engine: str, told: dict[str, list[str]], out: Path) -> dict[str, list[dict[str, Any]]]:
    worker, ranks = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else [], RANKS.get(engine, 1)
    folders = {kind: out / str(number) for number, kind in enumerate(told)}
    runs = [[*worker, "tests.workers.anything", str(folders[kind]), *arguments] for kind, arguments in told.items()]
    launch_series(engine, ranks, runs)
    return {
        kind: [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
        for kind, folder in folders.items()
    }


def decisions(events: list[dict[str, Any]]) -> list[tuple[int, list[str]]]:
    return [(event["step"], event["frozen"]) for event in events]


def check(result: dict[str, Any], reference: dict[str, Any], start: int = 0) -> None:
    """Against one process; `start`: the global batches that another engine did."""
    assert decisions(result["events"]) == decisions(reference["events"])
    for event, expected in zip(result["events"], reference["events"], strict=True):
        if event["step"] >= start:
            assert event["scores"] == pytest.approx(expected["scores"], rel=1e-4, abs=0)
        assert event["trainable_params"] == expected["trainable_params"]
        assert event["backward_from"] == expected["backward_from"]
    assert result["losses"] == pytest.approx(reference["losses"][start:], abs=1e-5)
    assert result["final"].keys() == reference["final"].keys()
    for name, value in result["final"].items():
        torch.testing.assert_close(value, reference["final"][name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.distributed
@pairs(RANKS)
def test_ranks_freeze_what_one_process_does(engine: str, kind: str) -> None:
    (reference,) = run("single")[kind]
    number = sum(len(names) for _, names in decisions(reference["events"]))
    assert number == SIZES.get(kind, number) != 0
    for result in run(engine)[kind]:
        assert (result["kind"], result["world_size"]) == (engine, RANKS[engine])
        check(result, reference)


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "kind"), [(engine, kind) for engine in BEFORE for kind in goes_on(engine)])
def test_an_engine_goes_on_where_another_one_was_cut(engine: str, kind: str, tmp_path: Path) -> None:
    """With other ranks, in the middle of a schedule, and of a prefix."""
    (reference,) = run("single")[kind]
    if engine == "single":
        results = launched(engine, {kind: going_on(engine, kind, tmp_path)}, tmp_path)[kind]
    else:
        results = run(engine)[f"go on, {kind}"]
    for result in results:
        assert result["events"][-1]["step"] >= CUT
        assert kind == "fallen" or result["events"][0]["step"] < CUT
        check(result, reference, start=CUT)


@pytest.mark.distributed
def test_what_is_left_out_of_the_sharding_goes_on_from_another_engine_and_to_the_bit() -> None:
    (reference,) = run("single")["lora"]
    for result, resumed in zip(run("fsdp2")["replicated"], run("fsdp2")["go on, replicated"], strict=True):
        check(result, reference)
        check(resumed, reference, start=CUT)
        assert result["again"][2] == result["losses"][CUT:]
        assert all(torch.equal(value, result["again"][1][name]) for name, value in result["final"].items())


@pytest.mark.distributed
@pytest.mark.parametrize("engine", RANKS)
def test_between_decisions_nothing_is_sent_and_only_elements_scores_are_kept(engine: str) -> None:
    found = {kind: run(engine)[f"count {kind}"] for kind in COUNTED}
    for kind, results in found.items():
        assert all(rank["observed"] == rank["free"] for rank in results), kind
        # There are 12 matrices: one number for each. A rank of ZeRO may have none of their elements.
        assert (max(rank["largest"] for rank in results) > 12) == (kind == "by element")
    assert all(rank["observed"] > 0 for rank in found["means"])


@pytest.mark.distributed
@pairs(["single", *RANKS])
def test_what_is_frozen_stays_and_a_snapshot_goes_on_to_the_bit(engine: str, kind: str) -> None:
    for result in run(engine)[kind]:
        assert len(result["at_freeze"]) == sum(len(event["frozen"]) for event in result["events"])
        for name, value in result["at_freeze"].items():
            assert torch.equal(value, result["final"][name]), name
            assert name not in result["trainable"]
        events, values, losses = result["again"]
        assert decisions(events) == decisions(result["events"])
        # DDP lays its buckets out anew where something thaws, and three numbers are then added in another order.
        exact = 0.0 if engine != "ddp" else 2e-7
        assert losses == pytest.approx(result["losses"][CUT:], rel=0, abs=exact)
        for name, value in result["final"].items():
            torch.testing.assert_close(values[name], value, rtol=0, atol=exact)


@pytest.mark.distributed
@pairs(["single", *RANKS], ["change", "one block", "one block, recomputed", "one block of deberta"])
def test_below_the_first_block_that_trains_nothing_is_kept_and_nothing_runs_backward(engine: str, kind: str) -> None:
    for result in run(engine)[kind]:
        lowest, above = result["kept"]
        if kind == "change":
            assert lowest[0] > 0
            assert (lowest[1], above[1]) == (True, True)
        else:
            assert result["events"][-1]["backward_from"] == 1
            # An output that needs no gradient has nothing behind it to run; a checkpoint keeps its input while it runs
            # (torch 2.10's in a place of its own, which is not looked at).
            assert lowest[0] <= int("recomputed" in kind)
            assert not lowest[1]
            assert above[0] > 0 or ("recomputed" in kind and is_older("torch", "2.13"))
            assert above[1]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_backward_pass_that_ends_early_gathers_nothing_below(engine: str) -> None:
    """FSDP2 fetches the block before the one at work, ZeRO-3 what came next in the passes that it has recorded.

    Under DDP every rank has all parameters: it gathers none, and reduces the gradients of what trains and no others.
    """
    for whole, ended in zip(run(engine)["change"], run(engine)["one block"], strict=True):
        if engine == "fsdp2":
            assert ended["gathers"] == (2 if is_older("torch", "2.13") else 1)  # seen with 2.10
            assert whole["gathers"] > ended["gathers"]
        elif engine == "zero3":
            assert {_block(name) for name in whole["whole"]} >= {0, 1}
            assert {_block(name) for name in ended["whole"]} == {1, None}  # the last: the head, too
            assert not any("embeddings" in name for name in ended["whole"])
        else:
            assert (whole["gathers"], ended["gathers"]) == (0, 0)
            for result in (whole, ended):
                assert result["sent"] == sum(result["final"][name].nbytes for name in result["trainable"])


def _block(name: str) -> int | None:
    inside = name.partition(".layer.")[2]
    return int(inside[0]) if inside else None


def test_by_default_the_matrices_of_tuners_and_blocks_freeze_and_nothing_else() -> None:
    lora, full = Training("lora").freezing, Training("full").freezing
    assert len(lora.freezable) == SIZES["lora"]
    assert all(".lora_A.default.weight" in name or ".lora_B.default.weight" in name for name in lora.freezable)
    assert len(full.freezable) == SIZES["full"]
    assert all(name.startswith("bert.encoder.layer.") and name.endswith(".weight") for name in full.freezable)
    assert not any("LayerNorm" in name for name in full.freezable)


def test_names_a_pattern_and_a_function_choose_alike() -> None:
    pattern = r"bert\.encoder\.layer\.0\.output\..*"
    by_pattern = Training("full", freezable=pattern).freezing.freezable
    by_function = Training(
        "full", freezable=lambda name, p: "layer.0.output." in name and p.dim() > 0
    ).freezing.freezable
    by_name = Training("full", freezable=(name for name in by_pattern)).freezing
    assert by_pattern == by_function == by_name.freezable
    assert len(by_pattern) == 4
    by_name.freeze(by_pattern[1])
    assert [*by_name.frozen] == [by_pattern[1]]


def test_what_says_what_may_freeze_is_told_what_has() -> None:
    class Lowest:
        """The first block, and what it is told."""

        def __init__(self) -> None:
            self.told: list[set[str]] = []

        def freezable(self) -> list[str]:
            return [f"bert.encoder.layer.0.{layer}.dense.weight" for layer in ("intermediate", "output")]

        def have_frozen(self, names: Any) -> None:
            self.told.append(set(names))

    lowest = Lowest()
    training = Training("full", freezable=lowest)
    training.train(0, 12)
    assert training.freezing.freezable == lowest.freezable()
    assert lowest.told[-1] == {*lowest.freezable()}
    assert len(lowest.told) == len(training.freezing.events)


def test_accelerate_s_own_checkpoint_holds_it(tmp_path: Path) -> None:
    whole, cut, resumed = Training("full"), Training("full"), Training("full")
    whole.train(0, 12)
    cut.train(0, 6)
    cut.accelerator.save_state(str(tmp_path / "state"))
    resumed.accelerator.load_state(str(tmp_path / "state"))
    resumed.train(6, 12)
    assert resumed.freezing.events != []
    assert decisions([vars(e) for e in resumed.freezing.events]) == decisions([vars(e) for e in whole.freezing.events])
    mine, theirs = resumed.values(), whole.values()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_model_without_an_adapter_is_saved_whole(tmp_path: Path) -> None:
    training = Training("full")
    training.train(0, 6)
    training.freezing.save_pretrained(tmp_path / "model")
    loaded = dict(BertForSequenceClassification.from_pretrained(tmp_path / "model").named_parameters())
    assert training.freezing.events != []
    for name, value in training.model.named_parameters():
        assert torch.equal(value, loaded[name]), name


def test_trainer_freezes_lora_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    examples = [{k: v[i] for k, v in global_batch(step).items()} for step in range(4) for i in range(12)]

    def train(resume: bool) -> tuple[Any, dict[str, torch.Tensor]]:
        settings = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=12,
            num_train_epochs=3,
            learning_rate=1e-2,
            report_to=[],
            save_steps=6,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=build("lora"), args=settings, train_dataset=examples)
        trainer.add_callback(callback := FreezingCallback())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if resume else None)
        assert callback.freezing is not None
        return callback.freezing, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    whole, expected = train(resume=False)
    again, values = train(resume=True)
    assert whole.freezable == again.freezable
    assert whole.frozen == again.frozen != {}
    assert all(torch.equal(value, expected[name]) for name, value in values.items())


@pytest.mark.parametrize("freezable", [None, r".*lora_.\.default\.weight", "names"])
def test_a_later_training_of_what_has_frozen_whole_trains_the_rest_on(freezable: str | None) -> None:
    """As an AFLoRA model does."""
    training = Training("lora")
    choice = training.freezing.freezable if freezable == "names" else freezable
    training.train(0, 12)
    assert training.freezing.remaining == []
    training.freezing.release()
    optimizer = training.accelerator.prepare(create_optimizer(training.model))
    again = AdaptiveFreezing(training.accelerator, training.model, optimizer, CONFIG, freezable=choice)
    assert (again.freezable, again.events) == ([], [])
    assert again.engine.trainable
    again.release()
    with pytest.raises(AFLoRAError, match="chooses none"):
        AdaptiveFreezing(training.accelerator, training.model, optimizer, CONFIG, freezable="nothing")


def test_a_vector_of_an_aflora_model_may_be_named_too() -> None:
    loop = Loop()
    loop.freezing.release()
    names = [n for n in loop.freezing.engine.trainable if n.endswith(".s_d")]
    loop.freezing = AdaptiveFreezing(
        loop.accelerator, loop.model, loop.optimizer, loop.freezing.config, freezable=names
    )
    loop.train()
    assert set(loop.freezing.frozen) == set(names)
    loop.model.set_adapter("default")
    assert not any(loop.freezing.engine.parameters[name].requires_grad for name in names)


@pytest.mark.parametrize("options", [{"granularity": "matrix"}, {"score": "random"}])
def test_between_decisions_nothing_is_sent_and_nothing_of_a_matrix_s_size_is_kept(options: dict[str, Any]) -> None:
    training = Training("full", FreezingConfig(total_steps=40, initial_steps=30, final_steps=5, **options))
    freezing, sent = training.freezing, []
    engine = freezing.engine
    original = engine.sum_over_ranks
    engine.sum_over_ranks = lambda vector: sent.append(vector.numel()) or original(vector)  # type: ignore[method-assign,func-returns-value]
    training.train(0, 20)
    assert sent == []
    held = [tensor for tensor in tensors_of(freezing._scores) if tensor.numel() >= min(freezing.numels.values())]
    assert held == []
    if "granularity" in options:
        assert len(tensors_of(freezing._scores)) >= 20  # a vector for each step
        freezing.scores()
        assert sent == [20 * (len(freezing.freezable) + 1)]
        assert freezing.progress.snapshot()[1]["parts"]["freezing"]["window"]["begun"] == 20


def test_one_number_a_matrix_goes_back_to_an_earlier_snapshot() -> None:
    """And is recorded again at once, as if the steps since had never been."""
    training = Training("full", FreezingConfig(total_steps=40, initial_steps=30, final_steps=5, granularity="matrix"))
    training.train(0, 5)
    tensors, record = training.freezing.progress.snapshot()
    training.train(5, 9)
    training.freezing.progress.restore(tensors, json.loads(json.dumps(record)))
    assert training.freezing.progress.snapshot()[1] == record
    training.train(5, 6)
    assert all(math.isfinite(score) for score in training.freezing.scores().values())


def test_a_prefix_is_refused_where_it_would_not_end_the_backward_pass() -> None:
    config = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3, prefix=True)
    training = Training("lora")
    training.freezing.release()
    checkpoint_activations(training.model, use_reentrant=True)
    with pytest.raises(AFLoRAError, match="'use_reentrant': False"):
        AdaptiveFreezing(training.accelerator, training.model, training.optimizer, config)
    with pytest.raises(AFLoRAError, match="outside of numbered blocks"):
        Training("full", config, freezable=r"bert\.pooler\.dense\.weight")
    with pytest.raises(AFLoRAError, match="in the lowest one that trains nothing may freeze"):
        Training("full", config, freezable=r".*layer\.1\..*dense\.weight")


REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "no such parameter": ("full", ["bert.nothing"], {}, "'bert.nothing', which is no parameter of the model"),
    "does not train": (
        "lora",
        ["base_model.model.bert.pooler.dense.weight"],
        {},
        "pooler.dense.weight', which does not train",
    ),
    "no match": ("full", "LayerNorm", {}, "chooses none of the .* parameters that train"),
    "no name": ("full", [], {}, "chooses none of"),
    "no pattern": ("full", "(", {}, "no regular expression"),
    "a number": ("full", 0, {}, "a function of name and parameter, .* it got 0"),
    "no names": ("full", [3], {}, "it got 3"),
    "all": ("full", ".*", {}, "All that trains may freeze"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_it_trains(what: str) -> None:
    kind, freezable, options, complaint = REFUSED[what]
    config = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3, **options)
    with pytest.raises(AFLoRAError, match=complaint):
        Training(kind, config, freezable)


def test_what_adalora_decides_over_is_refused_and_a_head_beside_it_freezes() -> None:
    """Its own step, which an own loop calls, takes the gradient of each of its parameters."""

    def attach(freezable: str | None) -> AdaptiveFreezing:
        tuner = AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=12)
        accelerator = Accelerator(cpu=True)
        adapted = get_peft_model(build_base(), tuner)
        model, optimizer = accelerator.prepare(adapted, create_optimizer(adapted))
        return AdaptiveFreezing(accelerator, model, optimizer, CONFIG, freezable=freezable)

    for freezable in (None, r".*lora_E.*"):
        with pytest.raises(AFLoRAError, match=r"AdaLoRA itself decides .*lora_.* would have no more"):
            attach(freezable)
    assert len(attach(r".*classifier.*").freezable) == 2


def test_of_a_tied_weight_both_names_freeze_or_none() -> None:
    def attach(freezable: list[str]) -> AdaptiveFreezing:
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        schedule = FreezingConfig(total_steps=4, initial_steps=0, final_steps=1)
        return AdaptiveFreezing(accelerator, model, optimizer, schedule, freezable=freezable)

    with pytest.raises(AFLoRAError, match="are one tied weight"):
        attach(["lm_head.weight"])
    assert attach(["lm_head.weight", "model.embed_tokens.weight"]).freezable == ["model.embed_tokens.weight"]


def test_a_tuner_of_which_all_freezes_needs_one_that_trains_on() -> None:
    """As LoRA of a language model, without a head."""
    schedule = FreezingConfig(total_steps=12, initial_steps=2, final_steps=0)
    training = Training("full", schedule, freezable=lambda name, parameter: True)
    training.train(0, 12)
    assert len(training.freezing.remaining) > 0
    assert training.freezing.events != []
