"""Every command over a folder whose author means harm: no code runs, nothing is written elsewhere, nothing hangs."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import aflora_dist.cli
from aflora_dist import AFLoRAConfig
from tests.adapter.test_peft import randomise
from tests.small_lm import make_small_language_model
from tests.view.written import write_run

CODE = "import pathlib\npathlib.Path({ran!r}).write_text('code of others ran')\n"
CONFIGURATION = """
from transformers import LlamaConfig, LlamaForCausalLM
class Configuration(LlamaConfig):
    model_type = "theirs"
class Model(LlamaForCausalLM):
    config_class = Configuration
"""
Trick = Callable[[Path], None]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that somebody might publish: a run with its adapter, its traces, and its model beside it."""
    folder = write_run(tmp_path_factory.mktemp("published") / "run")
    base = make_small_language_model(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), AFLoRAConfig(task_type="CAUSAL_LM"))
    randomise(model, 1)
    model.save_pretrained(str(folder / "adapter"))
    change_yaml(folder / "config.yaml", lambda c: (c["run"].clear(), c["data"].update(task="sft", name="demo")))
    window = folder / "tensorboard" / "profile" / "1_before"
    window.mkdir(parents=True)
    step = {"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#1", "pid": 1, "tid": 1, "ts": 0, "dur": 9}
    trace = {"distributedInfo": {"rank": 0, "world_size": 1}, "traceEvents": [step]}
    (window / "host_0.1.pt.trace.json").write_text(json.dumps(trace))
    return folder


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_yaml(path: Path, change: Callable[[Any], Any]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# -- what somebody might do to it ------------------------------------------------------------------------------------


def code_beside_the_model(run: Path) -> None:
    """As a model with its own modelling code has it; the run and the adapter ask for that code."""
    code = CODE.format(ran=str(run.parent / "RAN"))
    (run / "base" / "theirs.py").write_text(code + CONFIGURATION)
    classes = {"AutoConfig": "theirs.Configuration", "AutoModelForCausalLM": "theirs.Model"}
    change_json(run / "base" / "config.json", lambda c: c.update(model_type="theirs", auto_map=classes))
    change_json(
        run / "base" / "tokenizer_config.json",
        lambda c: c.update(auto_map={"AutoTokenizer": [None, "theirs.Tokenizer"]}, tokenizer_class="Tokenizer"),
    )
    for name in ("theirs.py", "tokenizer_config.json", "tokenizer.json"):
        shutil.copyfile(run / "base" / name, run / "adapter" / name)
    change_yaml(run / "config.yaml", lambda c: c["model"].update(trust_remote_code=True))
    write_study(run, {"model.trust_remote_code": True})
    mapping = {"base_model_class": "Model", "parent_library": "theirs"}
    change_json(run / "adapter" / "adapter_config.json", lambda c: c.update(auto_mapping=mapping))


def write_study(run: Path, settings: dict[str, Any]) -> None:
    settings |= {"model.name": str(run / "base"), "data.task": "sft", "data.name": "demo", "train.max_steps": 1}
    study = {"tasks": {"theirs": settings}, "methods": {"lora": {"method.name": "lora"}}, "seeds": [0]}
    (run / "study.yaml").write_text(yaml.safe_dump(study))


def a_tokenizer_with_code(run: Path) -> None:
    code_beside_the_model(run)
    shutil.copyfile(run.parent / "config.json", run / "base" / "config.json")


def a_kernel_of_the_hub(run: Path) -> None:
    change_json(run / "base" / "config.json", lambda c: c.update(attn_implementation="theirs/attention"))
    change_yaml(run / "config.yaml", lambda c: c["model"].update(attn_implementation="theirs/attention"))
    write_study(run, {"model.attn_implementation": "theirs/attention"})


def another_class_of_transformers(run: Path) -> None:
    change_json(run / "base" / "config.json", lambda c: c.update(architectures=["TrainingArguments"]))
    change_json(run / "adapter" / "adapter_config.json", lambda c: c.update(task_type=None))


class Hung(BaseException):
    """Which nothing catches."""


class Harm:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return exec, (CODE.format(ran=str(self.ran)),)


def pickles(run: Path) -> None:
    for path in (run / "adapter" / "adapter_model.safetensors", run / "base" / "model.safetensors"):
        path.unlink()
    for path in (run / "adapter" / "adapter_model.bin", run / "base" / "pytorch_model.bin"):
        path.write_bytes(pickle.dumps(Harm(run.parent / "RAN")))
    for name in ("host_0.memory.pickle", "host_0.2.pt.trace.json"):
        (run / "tensorboard" / "profile" / "1_before" / name).write_bytes(pickle.dumps(Harm(run.parent / "RAN")))


def a_pickle_called_safetensors(run: Path) -> None:
    for path in (run / "adapter" / "adapter_model.safetensors", run / "base" / "model.safetensors"):
        path.write_bytes(pickle.dumps(Harm(run.parent / "RAN")))


def yaml_that_makes_objects(run: Path) -> None:
    harm = f"!!python/object/apply:os.system ['touch {run.parent}/RAN']\n"
    (run / "config.yaml").write_text(f"model: {{name: {harm.strip()}}}\ndata: {{task: sft}}\ntrain: {{}}\n")


def yaml_that_multiplies(run: Path) -> None:
    levels = [f"x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 9)}]" for i in range(30)]
    text = "\n".join(["x0: &x0 [a, b]", *levels, "model: {name: a}", "data: {task: b}", "train: {epochs: *x30}"])
    (run / "config.yaml").write_text(text)


def files_of_the_model_outside_of_it(run: Path) -> None:
    (run.parent / "model.safetensors").write_bytes((run / "base" / "model.safetensors").read_bytes())
    keys = load_file(run / "base" / "model.safetensors").keys()
    (run / "base" / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(keys, "../../model.safetensors")}
    (run / "base" / "model.safetensors.index.json").write_text(json.dumps(index))


def an_index_of_nonsense(run: Path) -> None:
    (run / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": ["b"], "c": 1}}))


def links_to_a_secret(run: Path) -> None:
    (run.parent / "secret").write_text("SECRET")
    for path in (run / "base" / "LICENSE", run / "base" / "notes.txt", run / "adapter" / "chat_template.jinja"):
        path.symlink_to(run.parent / "secret")


def links_upwards(run: Path) -> None:
    for folder in (run, run / "adapter", run / "base", run / "tensorboard" / "profile"):
        (folder / "up").symlink_to("/")
        (folder / "round").symlink_to(folder)


def nested_deeply(run: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    for name in ("adapter/adapter_config.json", "base/config.json", "result.json", "base/generation_config.json"):
        (run / name).write_text(f'{{"peft_type": "AFLORA", "metrics": {{}}, "x": {deep}}}')
    for name in ("metrics.jsonl", "freeze_log.jsonl", "tensorboard/profile/1_before/host_0.1.pt.trace.json"):
        (run / name).write_text(f'{{"step": 1, "traceEvents": {deep}}}\n')


def nested_deeply_in_the_model_alone(run: Path) -> None:
    change_json(run / "base" / "tokenizer_config.json", lambda c: c.update(x=json.loads("[" * 900 + "]" * 900)))
    change_json(run / "base" / "config.json", lambda c: c.update(x=json.loads("[" * 900 + "]" * 900)))


def pipes(run: Path) -> None:
    for path in [p for p in run.rglob("*") if p.is_file()]:
        path.unlink()
        os.mkfifo(path)


def pipe(name: str) -> Trick:
    def put(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    put.__name__ = f"a_pipe_for_{name}"
    return put


def devices(run: Path) -> None:
    for name in ("result.json", "metrics.jsonl", "freeze_log.jsonl", "adapter/tokenizer.json", "base/LICENSE"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to("/dev/zero")


def files_of_a_terabyte(run: Path) -> None:
    names = ("result.json", "metrics.jsonl", "freeze_log.jsonl", "adapter/adapter_config.json", "base/config.json")
    for name in names:
        with (run / name).open("ab") as file:
            file.truncate(2**40)  # sparse: no block is used


def a_model_without_an_end(run: Path) -> None:
    change_json(run / "base" / "config.json", lambda c: c.update(num_hidden_layers=10**9, num_labels=10**9))


def sizes_without_an_end(run: Path) -> None:
    sizes = {"hidden_size": 10**15, "vocab_size": 10**15, "num_attention_heads": 10**9, "head_dim": 10**15}
    change_json(run / "base" / "config.json", lambda c: c.update(sizes))


def values_of_other_types(run: Path) -> None:
    change_json(run / "adapter" / "adapter_config.json", lambda c: c.update(r="4", bias=[], revision=3, task_type={}))
    wrong = {"hidden_size": "big", "architectures": 7, "id2label": [[]], "tie_word_embeddings": "yes"}
    change_json(run / "base" / "config.json", lambda c: c.update(wrong))
    change_json(run / "result.json", lambda c: c.update(metrics=[1], best=3, traces={"a": 1}, steps=[]))
    change_yaml(run / "config.yaml", lambda c: c.update(train=[1], data="x"))


def ranks_of_another_type(run: Path) -> None:
    change_json(run / "adapter" / "adapter_config.json", lambda c: c.update(r=3))


def a_task_of_no_kind(run: Path) -> None:
    change_json(run / "adapter" / "adapter_config.json", lambda c: c.update(task_type="X"))


def lists_instead_of_objects(run: Path) -> None:
    for path in run.rglob("*.json"):
        path.write_text("[1, 2]")


def numbers_that_are_none(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    change_tensors(
        path, lambda tensors: tensors.update({k: torch.full_like(v, float("nan")) for k, v in tensors.items()})
    )


def tensors_of_another_shape(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    change_tensors(path, lambda tensors: tensors.update({k: torch.ones(2, 2, 2) for k in tensors}))


def names_that_climb(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    for name in ("../../../climbed", "/climbed", "a\x1b[31m\x07", "x" * 5000):
        layer = f"base_model.model.{name}"
        shapes = {"A": (4, 8), "B": (8, 4), "s_d": (4,), "s_b": (8,)}
        new = {f"{layer}.aflora.{part}": torch.ones(shape) for part, shape in shapes.items()}
        save_file({**load_file(path), **new}, path, metadata={"format": "pt"})
    change_json(run / "result.json", lambda c: c.update(traces=["../../../../etc/passwd"], task="../../x"))
    change_json(run / "adapter" / "adapter_config.json", lambda c: c.update(modules_to_save=["../../x"]))


def a_map_without_an_end(run: Path) -> None:
    names = [f"base_model.model.layers.{i}.kind_{i}.aflora.default.A" for i in range(20_000)]
    event = {"step": 10**12, "frozen": names, "scores": dict.fromkeys(names, 1e-3)}
    (run / "freeze_log.jsonl").write_text(json.dumps(event) + "\n")


def numbers_of_many_digits(run: Path) -> None:
    digits = "9" * 5000
    (run / "result.json").write_text(f'{{"metrics": {{"accuracy": {digits}}}}}')
    (run / "metrics.jsonl").write_text(f'{{"step": {digits}}}\n{{"step": 1, "loss": 1e{digits}}}\n')
    trace = run / "tensorboard" / "profile" / "1_before" / "host_0.1.pt.trace.json"
    trace.write_text(f'{{"distributedInfo": {{"rank": 0, "world_size": {digits}}}, "traceEvents": []}}')


def a_small_file_that_unpacks_to_much(run: Path) -> None:
    (run / "tensorboard" / "profile" / "1_before" / "host_0.1.pt.trace.json").unlink()
    with gzip.open(run / "tensorboard" / "profile" / "1_before" / "host_0.1.pt.trace.json.gz", "wb") as file:
        file.write(b'{"traceEvents": [')
        for _ in range(400):
            file.write(b" " * 2**20)


def a_base_that_is_an_address(run: Path) -> None:
    address = "http://127.0.0.1:9/model"
    change_json(run / "adapter" / "adapter_config.json", lambda c: c.update(base_model_name_or_path=address))
    change_yaml(run / "config.yaml", lambda c: c["model"].update(name=address))


def a_base_that_climbs(run: Path) -> None:
    name = "../" * 30 + "etc"
    change_json(run / "adapter" / "adapter_config.json", lambda c: c.update(base_model_name_or_path=name))
    change_yaml(run / "config.yaml", lambda c: c["model"].update(name=name))


TRICKS: list[Trick] = [
    code_beside_the_model,
    a_tokenizer_with_code,
    a_kernel_of_the_hub,
    another_class_of_transformers,
    pickles,
    a_pickle_called_safetensors,
    yaml_that_makes_objects,
    yaml_that_multiplies,
    files_of_the_model_outside_of_it,
    an_index_of_nonsense,
    links_to_a_secret,
    links_upwards,
    nested_deeply,
    nested_deeply_in_the_model_alone,
    pipes,
    *map(pipe, ("adapter/tokenizer.json", "adapter/tokenizer_config.json", "base/config.json", "base/tokenizer.json")),
    *map(pipe, ("base/generation_config.json", "base/model.safetensors", "adapter/README.md", "result.json")),
    devices,
    files_of_a_terabyte,
    a_model_without_an_end,
    sizes_without_an_end,
    values_of_other_types,
    ranks_of_another_type,
    a_task_of_no_kind,
    lists_instead_of_objects,
    numbers_that_are_none,
    tensors_of_another_shape,
    names_that_climb,
    a_map_without_an_end,
    numbers_of_many_digits,
    a_small_file_that_unpacks_to_much,
    a_base_that_is_an_address,
    a_base_that_climbs,
]


# -- and what comes of it --------------------------------------------------------------------------------------------


@pytest.fixture
def run(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder as it was unpacked, and a working directory beside it."""
    folder = shutil.copytree(published, tmp_path / "run")
    shutil.copyfile(published / "base" / "config.json", tmp_path / "config.json")
    change_json(
        folder / "adapter" / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(folder / "base"))
    )
    change_yaml(folder / "config.yaml", lambda c: c["model"].update(name=str(folder / "base")))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [*sys.path])

    def hung(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    yield folder
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def commands(run: Path, out: Path) -> list[list[str]]:
    out.mkdir(exist_ok=True)
    (out / "asked.jsonl").write_text('{"prompt": "1 + 1"}\n')
    studies = [["study", str(file), "--out", str(out / "study")] for file in run.glob("study.yaml")]
    return [
        *studies,
        ["data", str(run / "config.yaml")],
        ["predict", str(run), str(out / "asked.jsonl"), "--data.max_new_tokens", "2"],
        ["to-lora", str(run), str(out / "lora")],
        ["merge", str(run), str(out / "merged")],
        ["plan", str(run / "config.yaml"), "--examples", "100", "--ranks", "1"],
        ["show", str(run)],
        ["collect", str(run)],
        ["trace", str(run), "--json", str(out / "numbers.json")],
    ]


FIGURES = (a_map_without_an_end, numbers_of_many_digits, values_of_other_types)  # they take a second to draw


def everything(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def test_the_folder_itself_is_good(run: Path, tmp_path: Path) -> None:
    for command in commands(run, tmp_path / "out"):
        sys.argv = ["aflora", *command]
        assert aflora_dist.cli.main() == 0, command


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.__name__)
def test_no_command_is_tricked(trick: Trick, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trick(run)
    out = tmp_path / "out"
    out.mkdir()
    before = everything(tmp_path)
    figures = [["show", str(run), "--figures", str(out / "figures")]] if trick in FIGURES else []
    for command in [*commands(run, out), *figures]:
        sys.argv = ["aflora", *command]
        signal.alarm(60)
        status = aflora_dist.cli.main()
        signal.alarm(0)
        said = capsys.readouterr()
        assert status in (0, 2), command
        if status == 2:
            assert said.err.splitlines()[-1].startswith("aflora: error: "), said.err
            assert len(said.err) < 10_000
        assert "\x1b" not in said.err + said.out
    assert not (tmp_path / "RAN").exists(), "code of others ran"
    assert not [path for path in out.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
    shutil.rmtree(out)
    assert {entry for entry in everything(tmp_path) if not entry[0].startswith(str(out))} == before
    assert not list((tmp_path / "here").iterdir())


def test_code_runs_where_the_command_line_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test before would prove nothing."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code_beside_the_model(run)
    sys.argv = ["aflora", "merge", str(run), str(tmp_path / "merged"), "--trust_remote_code"]
    aflora_dist.cli.main()
    assert (tmp_path / "RAN").exists()
