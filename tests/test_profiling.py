"""The profiling tools on small models: what they count is right; how long things take is not tested."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aflora_dist.tasks.data import load_data
from aflora_dist.tasks.sampler import GlobalBatchSampler
from aflora_dist.watch.peaks import peak_flops
from profiling.compare import main as compare
from profiling.compare import over_freeze_log, start
from profiling.launches import count_calls, count_launches, per_call
from profiling.methods import create
from profiling.models import build
from profiling.overhead import main as overhead
from profiling.schedule import main as schedule
from profiling.throughput import main as throughput
from profiling.throughput import summary
from profiling.trainings import Allocating, Training, evenly, peft_config
from tests.launch import launch

SMALL = ["--layers", "1", "--batch", "2", "--length", "16", "--steps", "2", "--warmup", "1"]
LENGTH = 64  # with fewer tokens what is kept of them is less than what is kept of the adapters


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("compare")
    more = ["--model", "bert-base", "--length", str(LENGTH), "--methods", "full", "adalora", "ia3", "--out", str(out)]
    done = compare([*SMALL, *more])
    assert json.loads((out / "compare.json").read_text()) == done
    for name in ("compare.md", "compare.png", "tensorboard"):
        assert (out / name).exists()
    return done["methods"]


def test_the_contract_of_compare_json(report: dict[str, Any]) -> None:
    methods = {"floor", "full", "lora", "adalora", "elora", "aflora_training", "aflora_half", "aflora_frozen", "aflora"}
    assert methods | {"ia3"} == set(report)
    keys = {"step_seconds_median", "flops", "trainable_params", "saved_bytes", "peak_memory_bytes"}
    keys |= {"optimizer_state_bytes", "ratio_to_elora", "ratio_to_lora", "ratio_to_floor"}
    keys |= {"launches_per_call", "tokens_per_second", "mfu"}
    assert all(keys <= set(numbers) for numbers in report.values())
    assert report["lora"]["ratio_to_lora"] == 1.0
    assert report["floor"]["launches_per_call"] == 0
    assert report["lora"]["tokens_per_second"] == 2 * LENGTH / report["lora"]["step_seconds_median"]
    assert report["lora"]["mfu"] is None  # of a CPU no peak is known


def test_parameters_and_flops_follow_the_closed_formulas(report: dict[str, Any]) -> None:
    sizes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    vectors = sum(4 + out for _, out in sizes)
    matrices = sum(4 * (i + o) for i, o in sizes[4:])
    assert report["floor"]["trainable_params"] == 0
    assert report["lora"]["trainable_params"] == sum(8 * (i + o) for i, o in sizes)
    assert report["elora"]["trainable_params"] == sum(1024 + o for _, o in sizes)
    assert report["aflora_training"]["trainable_params"] == vectors + matrices
    assert report["aflora_half"]["trainable_params"] == vectors + matrices / 2
    assert report["aflora_frozen"]["trainable_params"] == vectors
    assert report["aflora_frozen"]["optimizer_state_bytes"] == 8 * vectors
    tokens = 2 * LENGTH
    forward_and_backward = sum(2 * 2 * tokens * i * o for i, o in sizes)
    assert report["floor"]["linear_flops"] == forward_and_backward
    path = sum(2 * tokens * 4 * (2 * i + 3 * o) for i, o in sizes)  # Eq. 1: A x, B h and their way back, M
    assert report["aflora_frozen"]["linear_flops"] == forward_and_backward + path


def test_the_adapter_keeps_less_for_backward_than_lora(report: dict[str, Any]) -> None:
    floor, lora = report["floor"]["saved_bytes"], report["lora"]["saved_bytes"]
    assert report["aflora_training"]["saved_bytes"] < lora
    assert report["aflora_frozen"]["saved_bytes"] - floor < 2 / 3 * (lora - floor)


def test_the_paper_s_shape_has_the_paper_s_flops_ratio(tmp_path: Path) -> None:
    methods = compare(
        [*SMALL, "--model", "deberta-v3-base", "--length", "64", "--methods", "lora", "--out", str(tmp_path)]
    )["methods"]
    assert 2.9 < methods["elora"]["linear_flops"] / methods["aflora"]["linear_flops"] < 3.0


def test_an_unknown_method_or_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="There is no method 'magic'"):
        compare([*SMALL, "--model", "bert-base", "--methods", "magic", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="neither one of"):
        compare(["--model", "no/such-model", "--out", str(tmp_path)])


def test_bf16_works_on_the_default_model_and_says_whose_outputs_it_casts(tmp_path: Path) -> None:
    command = [*SMALL, "--dtype", "bf16", "--methods", "miss", "randlora", "dora", "--out", str(tmp_path)]
    ended = launch("single", 1, "-m", "profiling.compare", *command)  # a process has one precision for good
    assert ended.returncode == 0, ended.stderr[-3000:]
    done = json.loads((tmp_path / "compare.json").read_text())
    assert set(done["outputs_cast"]) == {"elora", "miss", "randlora"}  # not LoRA's, DoRA's, or ours
    assert "ELoRA" in (tmp_path / "compare.md").read_text().splitlines()[-1]
    assert done["methods"]["floor"]["launches_per_call"] > 0  # casts, which the float32 floor does not make


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_a_dtype_that_a_cpu_would_compute_in_float32_is_refused(dtype: str) -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        compare([*SMALL, "--dtype", dtype])


def test_the_rest_of_peft_s_methods_train_what_they_should(tmp_path: Path) -> None:
    sizes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    expected = {"miss": sum(16 * out for _, out in sizes), "lorafa": sum(8 * out for _, out in sizes)}
    expected["dora"] = sum(8 * (i + out) + out for i, out in sizes)
    expected["randlora"] = sum(24 * (32 + min(size)) for size in sizes)  # 768 / 32 bases
    report = compare([*SMALL, "--model", "bert-base", "--methods", *expected, "--out", str(tmp_path)])
    assert {name: report["methods"][name]["trainable_params"] for name in expected} == expected


def test_what_does_not_work_on_the_layers_is_left_out_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator, base = Accelerator(cpu=True), build("bert-base", 1)
    tokens = torch.ones(1, 4, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": torch.zeros(1, dtype=torch.long)}
    methods, left_out = start(["floor", "magic"], ["magic"], base, batch, accelerator)
    assert [method.name for method in methods] == ["floor"]
    assert "There is no method 'magic'" in left_out["magic"]
    assert "magic is left out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(["magic"], [], base, batch, accelerator)


def test_launches_are_operators_that_are_no_views() -> None:
    x = torch.randn(4, 6, requires_grad=True)

    def step() -> None:
        y = x.view(2, 12).T.detach().unsqueeze(0).expand(3, 12, 2)[1]
        torch.ops.aten._unsafe_view(y, [12, 2])
        y.add_(1)
        (x.t() @ x).sum().backward()

    forward = {"aten.add_.Tensor": 1, "aten.mm.default": 1, "aten.sum.default": 1}
    counts = count_launches(step)
    assert forward.items() <= (counts - Counter({"aten.mm.default": 2})).items()  # two of the three are backward's
    assert not any("view" in name or name.split(".")[1] in ("t", "expand", "select", "detach") for name in counts)


def test_lora_s_launches_are_those_that_were_counted_before() -> None:
    """DeBERTaV3-base's shape, whose query and key projections are called twice."""
    base, accelerator = build("deberta-v3-base", 2), Accelerator(cpu=True)
    tokens = torch.randint(1, 1000, (2, 16))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.zeros(2, dtype=torch.long)}

    def counted(name: str, dtype: torch.dtype | None = None) -> tuple[Counter[str], int]:
        method = create(name, base, accelerator)

        def step() -> None:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = method.model(**batch).loss
            loss.backward()

        calls = count_calls(method.adapted, lambda: method.model(**batch))
        return count_launches(step), calls

    floor, calls = counted("floor")
    assert calls == 16
    assert per_call(counted("lora")[0], floor, calls) == pytest.approx(9.6, abs=0.05)
    assert per_call(counted("lora", torch.bfloat16)[0], floor, calls) == pytest.approx(18.9, abs=0.05)


def test_peaks_are_known_by_the_device_s_whole_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756.5e12
    assert peak_flops("NVIDIA H200", "tf32") == 494.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA A10", "bf16") == 125e12
    assert peak_flops("NVIDIA L4", "bf16") != peak_flops("NVIDIA L40S", "bf16")
    assert peak_flops("Tesla T4", "fp16") == 65e12
    assert peak_flops("Tesla T4", "bf16") is None
    assert peak_flops("Tesla V100-SXM2-16GB", "fp16") == 125e12
    others = ("NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 unheard of", "x86_64")
    for unknown in others:
        assert peak_flops(unknown, "bf16") is None


def test_parameters_are_averaged_over_a_freeze_log(tmp_path: Path) -> None:
    lines = [{"step": 1, "trainable_params": 70}, {"step": 3, "trainable_params": 40}]
    (tmp_path / "freeze_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert over_freeze_log(tmp_path / "freeze_log.jsonl", 100, 6) == (100 + 100 + 70 + 70 + 40 + 40) / 6
    (tmp_path / "result.json").write_text(json.dumps({"head_params": 10}))
    assert over_freeze_log(tmp_path / "freeze_log.jsonl", 100, 6) == (100 + 100 + 60 + 60 + 30 + 30) / 6


@pytest.mark.distributed
def test_overhead_is_measured_on_two_ranks(tmp_path: Path) -> None:
    small = ["--matrices", "24", "--steps", "2", "--rebuilds", "1"]
    (row,) = overhead(["--engines", "ddp", "--ranks", "2", *small, "--out", str(tmp_path)])
    assert (row["engine"], row["ranks"], row["matrices"]) == ("ddp", 2, 24)
    assert row["decision_bytes"] == 8 * (24 + 2)  # a score per matrix, and the two numbers that must agree
    assert (tmp_path / "overhead.md").exists()
    assert (tmp_path / "overhead.png").exists()


def training(run: str, model: Path, **more: Any) -> Training:
    chosen = {"task": "demo", "glue": None, "updates": 3, "warmup": 1, "batch_size": 8, "max_length": 256}
    return Training(run=run, model=str(model), **(chosen | {"dtype": "fp32", "seed": 1} | more))


def seen(ranks: int, what: Training, folder: Path) -> list[list[list[float]]]:
    """What each rank saw of each update."""
    folder.mkdir()
    engine = "ddp" if ranks > 1 else "single"
    done = launch(engine, ranks, "-m", "profiling.trainings", str(folder), json.dumps(asdict(what)))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def review_lengths(model: Path, what: Training, of_the_main_job: bool) -> list[int]:
    """Tokens of each review; of those that the main job takes of them, or all."""
    config, _ = what.config(Path("unused"))
    if not of_the_main_job:
        config = replace(config, data=replace(config.data, max_train_examples=None))
    texts = load_data(config.data, what.seed).train["text"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [len(tokens) for tokens in tokenizer(list(texts), truncation=True, max_length=what.max_length)["input_ids"]]


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_main_job_s_tokens_are_counted(ranks: int, tiny_model: Path, tmp_path: Path) -> None:
    what = training("main job", tiny_model)
    lengths = review_lengths(tiny_model, what, of_the_main_job=True)
    assert len(lengths) == what.total * what.batch_size
    for rank, updates in enumerate(seen(ranks, what, tmp_path / "run")):
        sampler = GlobalBatchSampler(lengths, what.batch_size, tokens=256, rank=rank, world_size=ranks, seed=what.seed)
        pieces = [[lengths[i] for i in piece] for piece in sampler]
        counts_of = [(len(piece), sum(piece), len(piece) * max(piece)) for piece in pieces]
        of_update = range(0, len(pieces), sampler.micro_batches)
        expected = [[sum(c) for c in zip(*counts_of[at : at + sampler.micro_batches], strict=True)] for at in of_update]
        assert [counts for _, *counts in updates] == expected


@pytest.mark.distributed
@pytest.mark.parametrize(("run", "ranks"), [("lora/group_by_length", 2), ("adalora/random", 1)])
def test_trainer_s_tokens_are_counted(run: str, ranks: int, tiny_model: Path, tmp_path: Path) -> None:
    what = training(run, tiny_model)
    lengths = review_lengths(tiny_model, what, of_the_main_job=False)
    updates = list(zip(*seen(ranks, what, tmp_path / "run"), strict=True))
    assert len(updates) == what.total
    share = what.batch_size // ranks
    for update in updates:
        for _, examples, real, computed in update:
            assert examples == share
            assert computed % share == 0  # padded to this rank's longest
            assert computed // share in lengths
            assert share * min(lengths) <= real <= computed
    total = sum(computed for update in updates for *_, computed in update)
    real = sum(real for update in updates for *_, real, _ in update)
    assert (1 - real / total < 0.1) == (run == "lora/group_by_length")  # random batches pad much more than that


def test_global_batches_are_chosen_evenly_by_size() -> None:
    lengths = list(range(1, 41))
    chosen = evenly(range(40), lengths, batch=4, piece=2, count=5, seed=0)
    batches = sorted(chosen[at : at + 4] for at in range(0, 20, 4))
    assert batches == [list(range(at, at + 4)) for at in (4, 12, 20, 28, 36)]  # every other one of ten
    with pytest.raises(SystemExit, match="An epoch has 10 updates"):
        evenly(range(40), lengths, batch=4, piece=2, count=11, seed=0)


def test_adalora_s_budget_falls_as_its_authors_meant(tiny_model: Path) -> None:
    base: Any = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    model: Any = get_peft_model(base, peft_config("adalora", ["query", "value"], [], total=10))
    callback = Allocating(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(10):
        model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        callback.on_optimizer_step(None, SimpleNamespace(global_step=step), None)
        optimizer.zero_grad()
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 8 * 4  # from 12 to 8 on average, over four layers


def test_runs_are_compared_within_their_round() -> None:
    def one(run: str, number: int, speed: float) -> dict[str, Any]:
        rest = {"tokens_per_second": 1.0, "padding": 0.1}
        return {"task": "demo", "ranks": 1, "run": run, "round": number, "examples_per_second": speed, **rest}

    slow_round = [one("main job", 0, 2.0), one("lora/random", 0, 1.0)]
    ours, theirs = summary([*slow_round, one("main job", 1, 20.0), one("lora/random", 1, 10.0)])
    assert (ours["main_job_over_it"], theirs["main_job_over_it"]) == (1, 2)
    assert (theirs["low"], theirs["high"]) == (1, 10)


@pytest.mark.distributed
def test_throughput_is_measured_on_two_ranks(tiny_model: Path, tmp_path: Path) -> None:
    small = ["--ranks", "2", "--rounds", "1", "--updates", "2", "--warmup", "1", "--batch-size", "8"]
    runs = ["--runs", "main job", "lora/random"]
    report = throughput([*small, *runs, "--model", str(tiny_model), "--out", str(tmp_path)])
    assert [row["run"] for row in report["rows"]] == ["main job", "lora/random"]
    assert all(r["examples"] == 16 and 0 <= r["padding"] < 1 for r in report["rounds"])
    for name in ("throughput.json", "throughput.md", "throughput.png"):
        assert (tmp_path / name).exists()


def test_a_training_that_becomes_faster_is_measured_beside_its_plan(tiny_model: Path, tmp_path: Path) -> None:
    small = ["--model", str(tiny_model), "--steps", "10", "--batch-size", "4", "--max-length", "16"]
    report = schedule(["speed", *small, "--variants", "LoRA, blocks", "full, blocks", "--out", str(tmp_path)])
    assert [*report["variants"]] == ["LoRA", "LoRA, blocks", "full", "full, blocks"]
    assert {name: [*others] for name, others in report["ratios"].items()} == {
        "LoRA, blocks": ["LoRA"],
        "full, blocks": ["full"],
    }
    for name in report["ratios"]:
        found = report["variants"][name]
        assert len(found["seconds"]) == 10
        assert found["planned_moment_bytes"]
        assert found["furthest_from_plan"] == 0
        assert [*found["backward_from"].values()][-1] == 2
        kept = [*found["saved_bytes"].values()]
        assert kept[-1] < kept[0] / 2
    assert {path.name for path in tmp_path.iterdir()} == {"speed.json", "speed.md", "speed.png"}


def test_a_prefix_is_measured_by_its_method_without_it_and_without_freezing(tiny_model: Path, tmp_path: Path) -> None:
    small = ["--model", str(tiny_model), "--steps", "10", "--batch-size", "4", "--max-length", "16"]
    report = schedule(["speed", *small, "--out", str(tmp_path), "--variants", "AFLoRA, prefix"])
    seconds = {name: found["seconds"] for name, found in report["variants"].items()}
    assert [*seconds] == ["AFLoRA, never", "AFLoRA", "AFLoRA, prefix"]
    for name, other in (("AFLoRA", "AFLoRA, never"), ("AFLoRA, prefix", "AFLoRA"), ("AFLoRA, prefix", "AFLoRA, never")):
        ratio = report["ratios"][name][other]
        assert ratio["whole"] == sum(seconds[other]) / sum(seconds[name])
        assert ratio["last_tenth"] == seconds[other][-1] / seconds[name][-1]
    assert not any(report["variants"]["AFLoRA, never"][what] for what in ("backward_from", "planned_moment_bytes"))
    lines = (tmp_path / "speed.md").read_text().splitlines()
    assert sum(line.startswith("| AFLoRA, prefix |") for line in lines) == 3


def test_more_updates_than_there_are_examples_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--steps 118 .* the 7,530 examples .*--steps 117 at most"):
        schedule(["speed", "--model", "no such model", "--steps", "118", "--out", str(tmp_path)])
