"""What is wrong with a user's DeepSpeed file is said in a line, before processes talk or anything is read."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from aflora_dist import AFLoRAError
from aflora_dist.training import deepspeed_file
from aflora_dist.training.command_line import parse
from aflora_dist.training.run import main
from tests.launch import ROOT, free_port, launch

RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
NOTHING_IS_READ = ["--model.name", "no/such-model", "--data.task", "files", "--data.train_file", "nowhere.csv"]


@pytest.fixture
def under_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as one of two ranks that accelerate's launcher starts with --use_deepspeed; fp16 is too much."""
    for name, value in {**RANK, **MEETING, "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)  # newer CPUs have it


def good() -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    return settings


def zero(**more: Any) -> dict[str, Any]:
    return {**good(), "zero_optimization": {**good()["zero_optimization"], **more}}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in good().items() if name != key}


AUTO_SCHEDULE = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
FILES: dict[str, tuple[Any, str]] = {
    "scheduler": (
        {**good(), "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0}}},
        r'section "scheduler"',
    ),
    "decay": (
        {**good(), "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 50}}},
        "remove it; train",
    ),
    "one cycle": ({**good(), "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}}, "train.warmup_ratio"),
    "auto schedule": ({**good(), "scheduler": {"type": "WarmupLR", "params": AUTO_SCHEDULE}}, r'section "scheduler"'),
    "empty scheduler": ({**good(), "scheduler": None}, r'section "scheduler"'),
    "optimizer": (
        {**good(), "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
        r'"optimizer": remove it; train\.optimizer',
    ),
    "not json": ("{'zero_optimization': {}}", "cannot be taken as JSON: .*line 1 column 2"),
    "comment": ('{\n  "bf16": {}, // half\n}', "cannot be taken as JSON: .*line 2 column 15"),
    "empty": ("", "cannot be taken as JSON"),
    "list": ("[]", r"must hold an object, .*not \[\]"),
    "number": ("3", "must hold an object"),
    "twice": ('{"gradient_clipping": 1, "gradient_clipping": 0.1}', 'gives "gradient_clipping" twice'),
    "deep": ("[" * 100_000, "cannot be taken as JSON: nested too deeply"),
    "long number": ('{"steps_per_print": ' + "9" * 5000 + "}", "cannot be taken as JSON: .*digits"),
    "number as text": ({**good(), "train_batch_size": "64"}, 'says train_batch_size="64", but .* comes to 64'),
    "latin": (b'{"\xe4": 1}', "cannot be taken as JSON: .utf-8. codec"),
    "no zero": (without("zero_optimization"), "zero_optimization.stage is null; it must be 1, 2 or 3"),
    "stage 0": (zero(stage=0), "zero_optimization.stage is 0; it must be 1, 2 or 3"),
    "stage 4": (zero(stage=4), "zero_optimization.stage is 4"),
    "stage as text": (zero(stage="2"), 'zero_optimization.stage is "2"'),
    "stage true": (zero(stage=True), "zero_optimization.stage is true"),
    "zero is true": ({**good(), "zero_optimization": True}, "zero_optimization must be an object"),
    "fp16 is true": ({**good(), "fp16": True}, "fp16 must be an object"),
    "fp16 as text": ({**good(), "fp16": {"enabled": "yes"}}, "fp16.enabled must be true, false"),
    "misspelt": (
        {**good(), "gradient_cliping": 1.0},
        r'does not know "gradient_cliping".*did you mean "gradient_clipping"',
    ),
    "elsewhere": ({**good(), "stage": 2}, 'does not know "stage"'),
    "gone": ({**good(), "amp": {"enabled": True}}, 'does not know "amp"'),
    "misspelt in zero": (zero(overlap_com=True), "zero_optimization.overlap_com=true: Extra inputs are not permitted"),
    "misspelt in fp16": (
        {**good(), "fp16": {"enabled": False, "loss_scal": 0}},
        "fp16.loss_scal=0: Extra inputs are not permitted",
    ),
    "wrong type": (zero(reduce_bucket_size="big"), 'zero_optimization.reduce_bucket_size="big": .*integer'),
    "wrong device": (zero(offload_optimizer={"device": "gpu"}), 'offload_optimizer.device="gpu": Input should be'),
    "auto": (
        zero(allgather_bucket_size="auto"),
        "nothing can be filled in for zero_optimization.allgather_bucket_size",
    ),
    "auto elsewhere": ({**good(), "wall_clock_breakdown": "auto"}, "nothing can be filled in for wall_clock_breakdown"),
    "communication": ({**good(), "communication_data_type": "int3"}, "communication_data_type"),
    "batch": ({**good(), "train_batch_size": 8}, "says train_batch_size=8, but train.batch_size comes to 64"),
    "micro-batch": (
        {**good(), "train_micro_batch_size_per_gpu": 3},
        "says train_micro_batch_size_per_gpu=3, but .* to 32",
    ),
    "accumulation": ({**good(), "gradient_accumulation_steps": 4}, "says gradient_accumulation_steps=4, but .* to 1"),
    "clipping": (
        {**good(), "gradient_clipping": 1.0},
        "says gradient_clipping=1.0, but train.max_grad_norm comes to 0.1",
    ),
    "fp16": ({**good(), "fp16": {"enabled": True}}, r"asks for fp16, which DeepSpeed does not do on this device \(cpu"),
    "both": ({**good(), "fp16": {"enabled": True}, "bf16": {"enabled": True}}, "cannot be simultaneously enabled"),
    "sum": ({**good(), "gradient_allreduce_op": "sum"}, "(support DeepSpeed's |know \")gradient_allreduce_op"),
    "nvme": (zero(offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), "offload to NVMe"),
    "ratio": (zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "partial optimizer offload"),
    "round robin": (zero(round_robin_gradients=True), "round_robin_gradients"),
    "zero++": (zero(stage=3, zero_quantized_weights=True), r"ZeRO\+\+"),
    "mics": (zero(stage=3, mics_shard_size=2), "mics_shard_size"),
    "half masters": (
        {**good(), "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "16-bit master weights",
    ),
    "autocast": ({**good(), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast"),
    "tensor parallel": ({**good(), "tensor_parallel": {"autotp_size": 2}}, "tensor parallelism"),
    "old offload": (zero(cpu_offload=True), 'cpu_offload=true cannot be honoured: .*"offload_optimizer"'),
    "sequence parallel": ({**good(), "sequence_parallel_size": 2}, "sequence_parallel_size=2 cannot be honoured"),
    "stages": ({**good(), "pipeline": {"stages": 2}}, "pipeline.stages=2 cannot be honoured"),
    "divided before": ({**good(), "gradient_predivide_factor": 2.0}, "gradient_predivide_factor .*: remove it"),
    "scaled before": ({**zero(stage=3), "prescale_gradients": True}, "prescale_gradients .*: remove it"),
    "data": ({**good(), "data_efficiency": {"enabled": True}}, '"data_efficiency" cannot be honoured'),
}


def refused(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What the main job says; it reads no data and looks for no model before."""
    assert main([*NOTHING_IS_READ, *more]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("aflora: error:", "  - "))]
    assert [line for line in said if "error:" in line] == said[:1]
    assert max(map(len, said)) < 600
    return "\n".join(said)


@pytest.mark.usefixtures("under_deepspeed")
@pytest.mark.parametrize("case", FILES)
def test_a_deepspeed_file_that_cannot_be_honoured_is_refused_by_its_name_and_key(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = FILES[case]
    path = tmp_path / "ds.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    said = refused(capsys)
    assert re.search(expected, said), said
    assert str(path) in said


@pytest.mark.usefixtures("under_deepspeed")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, f"no file nowhere.json.*{ROOT}"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs"}, "ds_configs could not be read: Is a directory"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": '{"stage": 2}'}, 'does not know "stage"'),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "asks for fp16, which DeepSpeed does not do"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "stage is 0; it must be 1, 2 or 3"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload to NVMe"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping=1, but train.max_grad_norm comes to 0.1"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps=4"),
    ],
)
def test_what_the_launcher_itself_says_of_deepspeed_is_looked_at_too(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert re.search(expected, refused(capsys))


@pytest.mark.usefixtures("under_deepspeed")
@pytest.mark.parametrize(
    ("precision", "change", "expected"),
    [
        ("fp16", {"bf16": {"enabled": True}}, "cannot be simultaneously enabled"),
        ("bf16", {"bf16": {"enabled": False}}, "switches bf16 off, but --mixed_precision bf16 asks for it"),
        ("bf16", {"fp16": {"enabled": True}}, "cannot be simultaneously enabled"),
    ],
)
def test_a_precision_that_contradicts_the_launcher_s_is_refused(
    precision: str,
    change: dict[str, Any],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    (tmp_path / "ds.json").write_text(json.dumps({**good(), **change}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert re.search(expected, refused(capsys))


AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
TEMPLATE = {  # as transformers' documentation has it, and most people's files
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": AUTO},
    "scheduler": {"type": "WarmupLR", "params": AUTO_SCHEDULE},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True},
        "offload_param": {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
        "allgather_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


@pytest.mark.usefixtures("under_deepspeed")
def test_all_that_has_to_change_in_a_file_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    (tmp_path / "ds.json").write_text(json.dumps({**TEMPLATE, "_comment": "mine"}))
    said = refused(capsys).splitlines()
    assert said[0] == f"aflora: error: DeepSpeed's file {tmp_path}/ds.json:"
    expected = [
        'section "scheduler": remove it',
        'section "optimizer": remove it',
        'does not know "_comment", and may ignore it: remove it',
        "nothing can be filled in for zero_optimization.allgather_bucket_size",
        "says gradient_clipping=1.0, but train.max_grad_norm comes to 0.1",
        "optimizer offload to NVMe.*parameter offload to NVMe",
    ]
    assert len(said) == 1 + len(expected), said
    for line, pattern in zip(said[1:], expected, strict=True):
        assert re.search(pattern, line), line


@pytest.mark.usefixtures("under_deepspeed")
def test_what_transformers_template_says_of_zero_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with "device": none or null, as half of them have it."""
    config, _ = parse([])
    kept: dict[str, Any] = {key: value for key, value in TEMPLATE.items() if key not in ("optimizer", "scheduler")}
    kept["gradient_clipping"] = "auto"
    del kept["zero_optimization"]["allgather_bucket_size"]
    for offload in ({"device": "none", "pin_memory": True}, None):
        kept["zero_optimization"] |= {"offload_optimizer": offload, "offload_param": offload}
        (tmp_path / "ds.json").write_text(json.dumps(kept))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
        deepspeed_file.check_file(config, 2)
        assert deepspeed_file.compiled_ops() == ["deepspeed_shm_comm"]


@pytest.mark.usefixtures("under_deepspeed")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_files_that_are_right_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    config, _ = parse([])
    filled = {**zero(reduce_bucket_size="auto"), "train_batch_size": 64, "gradient_clipping": 0.1}
    for stage, scattered in ((1, True), (2, False)):
        whole = {**zero(stage=stage, reduce_scatter=scattered), "prescale_gradients": True}
        (tmp_path / "whole.json").write_text(json.dumps(whole))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "whole.json"))
        deepspeed_file.check_file(config, 2)
    filled |= {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 1,
        "flops_profiler": {"enabled": False},
    }
    (tmp_path / "filled.json").write_text(json.dumps(filled))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    deepspeed_file.check_file(config, 2)
    shipped = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(shipped) == 4
    embedded = base64.urlsafe_b64encode(shipped[0].read_bytes()).decode()
    for source in [*map(str, shipped), str(tmp_path / "filled.json"), shipped[0].read_text(), embedded]:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", source)
        deepspeed_file.check_file(config, 2)


@pytest.mark.usefixtures("under_deepspeed")
def test_a_number_that_the_data_contradict_is_refused_when_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = parse([])
    (tmp_path / "ds.json").write_text(json.dumps({**good(), "gradient_accumulation_steps": 1}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    deepspeed_file.check_file(config, 2)
    with pytest.raises(AFLoRAError, match=r"gradient_accumulation_steps=1, but train\.\* and data\.\* come to 3"):
        deepspeed_file.contradicted(config, 2, 3)


@pytest.mark.distributed
def test_a_schedule_of_deepspeed_s_own_is_refused_in_a_user_s_loop_unless_the_loop_holds_it() -> None:
    done = launch("zero2", 2, str(ROOT / "tests" / "workers" / "ds_schedule.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert "has a scheduler section (WarmupLR)" in found["said"]
    assert found["frozen"] == 4 * 2
    for number, rates in enumerate(found["rates"]):
        assert rates == pytest.approx([0.01 * min(number / 10, 1.0)] * 2), "also after param groups have lost some"


def test_the_keys_that_are_known_are_those_that_deepspeed_reads() -> None:
    """A key that DeepSpeed has dropped, or misspelt here, stands nowhere in its code or accelerate's."""
    import accelerate
    import deepspeed

    text = "".join(
        path.read_text(errors="replace")
        for package in (accelerate, deepspeed)
        for path in Path(package.__file__).parent.rglob("*.py")
    )
    assert [key for key in sorted(deepspeed_file._known()) if not re.search(rf"['\"]{key}['\"]", text)] == []
