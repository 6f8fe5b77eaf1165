"""The documentation: it builds without a warning, its code runs, what it names exists."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM

import aflora_dist.cli
from aflora_dist.options import Config
from aflora_dist.training.command_line import OPTIONS, parse
from aflora_dist.training.run import main as train
from tests.browser import CHROMEDRIVER, CHROMIUM, Browser
from tests.pages import PAGES, ROOT, Block, blocks, classifier, snippets, with_trl
from tests.runs import command_line
from tests.slurm import submit
from tests.small_lm import make_small_language_model, write_problems
from tests.test_export import adapter_for

GENERATED = {"index.md", "contributing.md", "changelog.md", "security.md"}  # files of the root, by docs/hooks.py
PAGES_AND_CHANGES = [*PAGES, ROOT / "CHANGELOG.md"]


def named(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


# Read from the first line to the last: each block finds what those before it have left.
TUTORIALS = [page for page in PAGES if page.name in ("classifier.md", "large_models.md")]


def having(language: str) -> list[Path]:
    pages = [page for page in PAGES if page not in TUTORIALS]
    return [page for page in pages if any(block.language == language for block in blocks(page))]


@pytest.fixture(autouse=True)
def own_settings_of_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()


# -- the site -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with mock.patch.dict(os.environ, {"NO_MKDOCS_2_WARNING": "1"}):
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))  # aborts at a warning
    return folder


def test_the_site_holds_every_page_and_fetches_nothing(site: Path) -> None:
    listed = re.findall(r"^ +- .*: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    pages = {path.stem for path in site.glob("*.html")}
    assert pages >= {Path(name).stem for name in (*GENERATED, *(ROOT / "docs").glob("*.md"))}
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\" >]+)", text)
        assert fetched == [], page.name
    shown = "".join(page.read_text() for page in PAGES)
    for picture in (ROOT / "docs" / "images").iterdir():
        assert f"images/{picture.name})" in shown, f"no page shows {picture.name}"
    for picture in (ROOT / "docs" / "images").glob("*.svg"):
        assert re.findall(r"url\(\W*http[^)]*|(?:href|src)=\"http[^\"]*", picture.read_text()) == []


def test_its_search_finds_pages_where_there_is_no_server(site: Path) -> None:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("needs Chromium and ChromeDriver (Debian: chromium, chromium-driver)")
    # A window that is not in front has no focus to be told of; the search begins with it.
    typed = "for (const kind of ['focusin', 'keyup']) box.dispatchEvent(new Event(kind, {bubbles: true}))"
    found = "return [...document.querySelectorAll('.md-search-result__item a')].map(a => a.getAttribute('href'))"
    with Browser() as page:
        page.open((site / "plan.html").as_uri())
        page.run("document.querySelector('[name=query]').value = 'granularity'")
        end = time.monotonic() + 30
        while not (links := page.run(found)) and time.monotonic() < end:
            page.run("const box = document.querySelector('[name=query]'); box.focus();" + typed)
            time.sleep(0.5)
    assert any("anything.html" in link for link in links), links


def test_the_api_pages_say_what_the_docstrings_say(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in aflora_dist.__all__:
        assert f'id="{sys.modules[getattr(aflora_dist, name).__module__].__name__}.{name}"' in text, name
    options = (site / "configuration.html").read_text(encoding="utf-8")
    config = parse([])[0]
    for group, values in vars(config).items():
        for option in vars(values) if hasattr(values, "__dict__") else ():
            assert f">{option}</code>" in options, f"{group}.{option}"


def test_the_api_s_names_are_what_the_package_gives() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: ([\w.]+)\.(\w+)$((?:\n +.*)*)", page, re.MULTILINE)
    assert sorted(name for _, name, _ in documented) == sorted(aflora_dist.__all__)
    for module, name, options in documented:
        found = getattr(importlib.import_module(module), name)
        assert found is getattr(aflora_dist, name)
        for members in re.findall(r"members: \[(.*)\]", options):
            for member in members.split(", "):  # or an attribute, which the docstring has
                assert hasattr(found, member) or f" {member}: " in found.__doc__, f"{name}.{member}"
    for module, name in re.findall(r"\.md#(aflora_dist[\w.]*)\.(\w+)", page):
        assert hasattr(importlib.import_module(module), name)


@named(PAGES_AND_CHANGES)
def test_links_and_files_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.split("#")[0]
        if path and not re.match(r"\w+:", path) and path not in GENERATED:
            assert (page.parent / path).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:aflora_dist|tests|launch|ds_configs|profiling|examples|docs|\.ci)/[\w./*-]*)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name} names {path}"
    for command in re.findall(r"`(pytest [^`]+)`", text):
        read_by_pytest(shlex.split(command)[1:])


def test_figures_that_decide_stand_on_the_page_that_measured_them() -> None:
    page = (ROOT / "docs" / "worth_it.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \| .*?\]\((\w+\.md)?(?:#[^)]*)?\) \|$", page, re.MULTILINE)
    assert len(rows) > 9

    def figures(text: str) -> set[float]:
        return {float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*\.\d+|\d[\d,]*,\d{3}", text)}

    for text, measured in rows:  # without a page: further below
        known = (
            (ROOT / "docs" / measured).read_text(encoding="utf-8") if measured else page.split("## Why the ratios")[1]
        )
        assert figures(text) - figures(known) == set(), text


@named(PAGES)
def test_every_option_that_is_named_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    groups = "|".join({option.split(".")[0] for option in OPTIONS if "." in option})
    for code in re.findall(r"`([^`\n]+)`", text):
        for name in re.findall(rf"(?<![\w./])(?:--)?((?:{groups})\.[a-z_]+)\b(?![.\w(/])", code):
            other = name == "freezing.progress" or name.endswith((".jsonl", ".csv"))  # an attribute; files
            assert name in OPTIONS or other, f"{page.name} names {name}"


# -- the matrix of engines, the errors, the versions ---------------------------------------------


def test_every_cell_of_the_matrix_names_a_test_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    matrix = text.split("## What each engine supports")[1].split("\n## ")[0]
    proofs = dict(re.findall(r'^\[([\w-]+)\]: #\S+ "(.*)"$', text, re.MULTILINE))
    cells = re.findall(r"\[[\w ]+\]\[([\w-]+)\]", matrix)
    assert set(cells) == set(proofs)
    rows = [line for line in matrix.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        for cell in re.split(r"(?<!\\)\|", row)[2:-1]:
            assert re.fullmatch(r" (-|\[[\w ]+\]\[[\w-]+\]) ", cell), row

    class Collected:
        def __init__(self) -> None:
            self.ids: set[str] = set()

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.ids = {item.nodeid for item in session.items}

    collected = Collected()
    files = sorted({str(ROOT / proof.split("::")[0]) for proof in proofs.values()})
    quiet = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", f"--rootdir={ROOT}"]
    assert pytest.main([*quiet, *files], plugins=[collected]) == 0
    capsys.readouterr()
    known = collected.ids | {name.split("[")[0] for name in collected.ids}
    # A module that is skipped here, for want of a package, is read.
    modules = {name.split("::")[0] for name in collected.ids}
    for proof in proofs.values():
        module, test = proof.split("::", 1)
        if module not in modules:
            assert f"\ndef {test.split('[')[0]}(" in (ROOT / module).read_text(), proof
        else:
            assert proof in known


def messages() -> str:
    """All texts of the code, those of f-strings with a gap where a value stands."""
    found = []
    for path in (ROOT / "aflora_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_error_that_is_quoted_is_in_the_code() -> None:
    code = messages()
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    quoted = [
        cell for row in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for cell in re.findall(r"`([^`]+)`", row)
    ]
    assert len(quoted) > 30
    for message in quoted:
        if message.startswith("KeyError"):
            continue  # PEFT's
        for part in message.split("..."):
            assert part.strip() in code, message


def test_versions_are_those_that_are_pinned() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE)
    assert len(rows) > 8
    assert [(name, pins[name]) for name, _ in rows if name in pins] == [(n, v) for n, v in rows if n in pins]


def test_what_every_project_has_can_be_read() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == aflora_dist.__version__
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        assert hook["entry"].split()[0] in {".venv/bin/ruff", ".venv/bin/mypy"}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert any(".ci/run" in step.get("run", "") for step in workflow["jobs"]["tests"]["steps"])


# -- Python blocks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """What the snippets and commands find: small models, data, runs.

    Attributes:
        tutorial: Commands find what those before them have left in `folder`, and nothing else.
    """

    folder: Path
    encoder: Path
    decoder: Path
    reviews: Path
    problems: Path
    run: Path
    tutorial: bool = False


def clone(folder: Path) -> Path:
    """The repository's own folders, in one to work in."""
    for name in ("launch", "ds_configs", "examples", "docs", "tests", ".ci", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def place(tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder to work in, with the repository's own folders in it, and a finished run outside of it."""
    folder = clone(tmp_path_factory.mktemp("place"))
    outside = tmp_path_factory.mktemp("outside")
    problems = outside / "problems"
    problems.mkdir()
    write_problems(problems / "train.jsonl", 24, seed=0)
    write_problems(problems / "test.jsonl", 4, seed=1)
    found = Place(
        folder, tiny_model, make_small_language_model(outside / "decoder"), reviews, problems, outside / "run"
    )
    assert train(shrunk([], found, found.run)) == 0
    return found


def with_export(place: Place) -> dict[str, Any]:
    adapter_for(place.decoder, Path("adapter"))
    shutil.rmtree("OUT", ignore_errors=True)
    assert aflora("to-lora", "adapter", "OUT") == 0
    return {"model": AutoModelForCausalLM.from_pretrained(place.decoder)}


def with_trl_by_name(place: Place) -> dict[str, Any]:
    if not Path("MODEL").exists():
        Path("MODEL").symlink_to(place.decoder)
    return with_trl(place.decoder)


# By page, what its snippets find before them.
BEFORE: dict[str, Callable[[Place], dict[str, Any]]] = {
    "README.md": lambda place: classifier(place.encoder) | {"accelerator": Accelerator(cpu=True)},
    "own_loop.md": lambda place: classifier(place.encoder),
    "moving.md": lambda place: classifier(place.encoder) | {"accelerator": Accelerator(cpu=True)},
    "trainer.md": with_trl_by_name,
    "serving.md": with_export,
}


def said_of_itself(code: str) -> list[str]:
    """The outputs that a snippet promises: `print(...)  # OUTPUT`."""
    return re.findall(r"^print\(.*\)  # (.+)$", code, re.MULTILINE)


@named(having("python"))
def test_python_runs(page: Path, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = BEFORE.get(page.name, lambda place: {})
    shared: dict[str, Any] | None = None
    for block in snippets(page):
        if shared is None and block.remark != "run: on its own":
            shared = before(place)
        names = before(place) if block.remark == "run: on its own" else shared
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.code, str(page), "exec"), names)
        if expected := said_of_itself(block.text):
            assert printed.getvalue().splitlines() == expected


# -- commands ---------------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command: comments gone, lines joined, variables that the block has set put in."""
    known: dict[str, str] = {}
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s+&&\s+", line):
            words = shlex.split(part, comments=True)
            if words and words[0].startswith("$") and words[0][1:] in known:
                words = [*shlex.split(known[words[0][1:]]), *words[1:]]
            if words[:1] == ["export"]:
                known |= dict([words[1].split("=", 1)])
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words


@functools.cache
def parsed(*arguments: str) -> tuple[Config, str]:
    return parse(list(arguments))


def of_main_job(words: list[str]) -> list[str]:
    """What a command tells the main job, or its plan; nothing if it does not train."""
    *_, start = [
        -1,
        *(at for at, word in enumerate(words) if word == "aflora_dist.training.run" or word[-7:] == ".sbatch"),
    ]
    start = 1 if words[:2] in (["aflora", "train"], ["aflora", "plan"]) else start
    arguments = words[start + 1 :] if start > 0 else []
    own = ("--ranks", "--engines", "--examples", "--json", "--mixed_precision", "--help")
    end = next((at for at, word in enumerate(arguments) if word in own or word.endswith(".py")), len(arguments))
    return arguments[:end]


@named([page for page in PAGES if page.name in ("classifier.md", "large_models.md", "data.md")])
def test_commands_of_a_page_train_a_model_alike(page: Path) -> None:
    """Whoever copies one, on another machine, gets the training that the page is about."""
    found: dict[tuple[str, str], list[Any]] = {}
    for block in blocks(page):
        for arguments in map(of_main_job, commands(block) if block.language == "bash" else ()):
            if arguments:
                config, _ = parsed(*arguments)
                train = config.train
                rates = (train.epochs, train.learning_rate, train.head_learning_rate, train.max_grad_norm)
                found.setdefault((config.model.name, config.method.name), []).append(rates)
    assert found
    for model, all_rates in found.items():
        assert len(set(all_rates)) == 1, (model, all_rates)
        assert all_rates[0][:2] != (Config().train.epochs, Config().train.learning_rate), f"{model}: defaults"


def shrunk(arguments: list[str], place: Place, run: Path | None = None) -> list[str]:
    """The main job's arguments with its smallest model, data and training behind them."""
    config, _ = parsed(*arguments)
    files = {"data.path": "null", "data.name": "null", "data.hold_out": 0, "data.max_eval_examples": 8}
    files |= {"data.subset": "null", "data.validation_split": "null", "data.columns": "{}", "data.mix": "{}"}
    small: dict[str, Any] = files | {"run.tensorboard": False, "run.trackers": "[]", "profile.enabled": False}
    if run is not None:
        small["run.dir"] = run
    if config.data.task == "sft":
        small |= {"model.name": place.decoder, "model.dtype": "float32", "data.max_new_tokens": 4}
        small |= {"data.train_file": place.problems / "train.jsonl", "train.epochs": 1, "train.batch_size": 8}
        small |= {"data.validation_file": place.problems / "test.jsonl", "data.max_length": 64}
        small |= {"train.eval_batch_size": 4}
    else:
        small |= {"model.name": place.encoder, "data.task": "files", "data.max_length": 32}
        small |= {"data.train_file": place.reviews / "train.csv", "data.max_train_examples": 96}
        small |= {"data.validation_file": place.reviews / "dev.csv", "train.epochs": 2, "train.batch_size": 16}
    if config.method.name == "aflora":
        small |= {"freezing.initial_epochs": 0.3, "freezing.final_epochs": 0.3, "freezing.every": 1}
    if place.tutorial:
        small = {key: value for key, value in small.items() if key not in ("data.train_file", "data.validation_file")}
    known = {f"{name}.{key}" for name, group in vars(config).items() if is_dataclass(group) for key in vars(group)}
    return [*arguments, *command_line({key: value for key, value in small.items() if key in known})]


RUN_ALREADY: set[str] = set()


def run_main_job(arguments: list[str], place: Place) -> None:
    """In this process, unless that very training was run for another command."""
    if "--help" in arguments:
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            parse(arguments)
        return
    chosen = [i for i, word in enumerate(arguments) if word.startswith("runs/") and arguments[i - 1] == "--resume"]
    if chosen:  # an earlier checkpoint of that very training, whose last is another
        (at,) = chosen
        RUN_ALREADY.clear()
        run_main_job([*arguments[: at - 1], *arguments[at + 1 :]], place)
        first, *_ = sorted((place.folder / "trained" / "checkpoints").glob("step_*"))
        assert train([*shrunk(arguments[: at - 1], place, place.folder / "trained"), "--resume", str(first)]) == 0
        return
    small = shrunk(arguments, place, None if place.tutorial else place.folder / "trained")
    _, resolved = parsed(*small)
    if (what := re.sub(r"^preset:.*\n|^ +dir: .*\n", "", resolved, flags=re.MULTILINE)) in RUN_ALREADY:
        return
    RUN_ALREADY.add(what)
    if not place.tutorial:
        shutil.rmtree(place.folder / "trained", ignore_errors=True)
    assert train(small) == 0


class ReadError(Exception):
    """What is raised instead of going on, once a command line has been read."""


def read_by_its_parser(main: Callable[..., Any], arguments: list[str]) -> None:
    read = argparse.ArgumentParser.parse_args

    def and_no_further(self: Any, args: Any = None, namespace: Any = None) -> None:
        read(self, args, namespace)
        raise ReadError

    with mock.patch.object(argparse.ArgumentParser, "parse_args", and_no_further), pytest.raises(ReadError):
        main(arguments)


def read_by_pytest(arguments: list[str]) -> None:
    for word in arguments:
        if word.startswith("tests"):  # files, and plugins
            file = word.split("::")[0] if "/" in word or word == "tests" else word.replace(".", "/") + ".py"
            assert list(ROOT.glob(file)), f"pytest {word}"


def run_launcher(arguments: list[str], place: Place) -> None:
    """What accelerate's own parser makes of it; the script in one process (every configuration has tests)."""
    options = launch_command_parser().parse_args(arguments)
    if options.config_file is not None:
        assert (place.folder / options.config_file).is_file(), options.config_file
    if not options.module:
        run_script([options.training_script, *options.training_script_args], place)
    else:
        run_module([options.training_script, *options.training_script_args], place)


def run_module(words: list[str], place: Place) -> None:
    name, *arguments = words
    if name == "aflora_dist.training.run":
        run_main_job(arguments, place)
    elif name == "aflora_dist.predict":
        run_aflora(["predict", *arguments], place, lambda: place.run)
    elif name == "aflora_dist.compat.contract":
        with contextlib.redirect_stdout(io.StringIO()) as out:
            importlib.import_module(name).main()
        assert out.getvalue()
    elif name in ("http.server",):
        assert importlib.util.find_spec(name)
    else:
        assert name.startswith(("profiling.", "tests.")), f"nobody runs python -m {name}"
        read_by_its_parser(importlib.import_module(name).main, arguments)


def run_script(words: list[str], place: Place) -> None:
    name, *arguments = words
    script = place.folder / name
    assert script.is_file(), name
    if script.parent.name == "examples":  # tests/test_examples.py runs them all; here is read what they are told
        source = script.read_text(encoding="utf-8")
        if "parse_args" in source:
            with mock.patch.object(sys, "path", [str(script.parent), *sys.path]):
                main = runpy.run_path(str(script))["main"]
            with mock.patch.object(sys, "argv", [name, *arguments]):
                read_by_its_parser(lambda _: main(), arguments)
        else:
            run_main_job(["examples/reviews.yaml", *arguments], place)
    elif script.name == "accuracy.py":
        (place.folder / "images").mkdir(exist_ok=True)
        assert runpy.run_path(str(script))["main"]([*arguments, "--out", str(place.folder / "accuracy.md")]) == 0
    elif script.name == "pictures.py":
        drawn = place.folder / "drawn"
        drawn.mkdir(exist_ok=True)
        supply(arguments, place.folder, place.run)
        assert runpy.run_path(str(script))["main"]([*arguments, "--out", str(drawn)]) == 0
        kept, new = (folder / "freezing.svg" for folder in (ROOT / "docs" / "images", drawn))
        if f"Matplotlib v{matplotlib.__version__}" in kept.read_text():
            drawn_now, drawn_then = (re.sub(r"\b[mp][0-9a-f]{10}\b", "", path.read_text()) for path in (new, kept))
            assert drawn_now == drawn_then, "the picture is not what the schedule draws: draw it anew"
    else:
        raise AssertionError(f"nobody runs {name}")


def aflora(*arguments: str) -> int:
    with mock.patch.object(sys, "argv", ["aflora", *arguments]):
        return aflora_dist.cli.main()


def supply(arguments: list[str], folder: Path, run: Path, several: bool = False) -> None:
    """Put a finished run, or a folder of one, where a command looks for it, and nothing where it writes."""
    for word in arguments:
        if word == "RUN" or word.startswith("runs/"):
            shutil.copytree(run, folder / word / ("one" if several else ""), dirs_exist_ok=True)
        if word == "OUT":
            shutil.rmtree(folder / word, ignore_errors=True)
        if word in ("reviews.csv", "--out"):  # of aflora predict
            for written in (*folder.glob("reviews.predicted.*"), *folder.glob("labelled.*")):
                written.unlink()


def run_aflora(words: list[str], place: Place, profiled: Callable[[], Path]) -> None:
    command, *arguments = words
    if command == "train":
        return run_main_job(arguments, place)
    if command == "data" and place.tutorial:
        arguments = [*arguments, "--model.name", str(place.encoder)]
    elif command == "data" and arguments[0] == "--preset":
        arguments = shrunk(arguments, place)
    elif command == "data":  # of any file, with the smallest model
        arguments = [str(place.problems / "train.jsonl"), *arguments[1:], "--model.name", str(place.decoder)]
    elif not place.tutorial:
        supply(arguments, place.folder, profiled() if command == "trace" else place.run, several=command == "collect")
        shutil.copyfile(place.reviews / "dev.csv", place.folder / "reviews.csv")
    if command == "plan":
        own = {"--ranks", "--engines", "--examples", "--json", "--mixed_precision"}
        first = next((i for i, word in enumerate(arguments) if word in own), len(arguments))
        arguments = [*shrunk(arguments[:first], place), *arguments[first:]]
    if command in ("study", "reproduce") and arguments:  # tests/study does such runs
        for name in ("train.csv", "dev.csv"):  # which examples/study.yaml names
            if not (place.folder / name).exists():
                shutil.copyfile(place.reviews / name, place.folder / name)
        if "--data.path" in arguments:  # GLUE's files, whose names on the hub do for a plan
            at = arguments.index("--data.path")
            del arguments[at : at + 2]
        arguments = [*(word.replace("FOLDER", str(place.problems)) for word in arguments), "--dry_run"]
    assert aflora(command, *arguments) == 0
    return None


def run_sbatch(words: list[str], place: Place) -> None:
    """With stand-ins for Slurm's commands; tests/training/test_slurm.py submits these scripts to a real Slurm."""
    at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    options, script, arguments = words[:at], words[at], words[at + 1 :]
    element = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "0"}
    array = element if any(option.startswith("--array=") for option in options) else {}
    started = submit(place.folder / script, arguments, place.folder, place.folder / "slurm", **array)
    assert started.returncode == 0, started.stderr
    if arguments[0].endswith(".py"):
        run_script([word.replace("{seed}", "0") for word in arguments], place)
    else:
        run_main_job(arguments, place)


def read_by_pip(words: list[str], place: Place) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = (ROOT / "constraints.txt").read_text() + (ROOT / ".ci" / "run").read_text()
    assert words[0] == "install"
    for word in words[1:]:
        if found := re.match(r"(?:\.|aflora[-_]dist)\[(.*)\]$", word):
            assert set(found[1].split(",")) <= set(project["optional-dependencies"])
        elif "==" in word and "--target" not in words:
            assert word in pins, f"{word} is not what is pinned"


def run_command(words: list[str], place: Place, profiled: Callable[[], Path]) -> None:
    program, *rest = words
    if program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program == "aflora":
        run_aflora(rest, place, profiled)
    elif program == "accelerate" and rest[0] == "launch":
        run_launcher(rest[1:], place)
    elif program in ("python", "python3") and rest[0] == "-m":
        run_module(rest[1:], place)
    elif program in ("python", "python3"):
        run_script(rest, place)
    elif program == "pytest":
        read_by_pytest(rest)
    elif program == "pip":
        read_by_pip(rest, place)
    elif program == "sbatch":
        run_sbatch(rest, place)
    elif program == "hf":  # tests/tasks/test_on_hub.py downloads and uploads by it
        assert rest[0] in ("download", "upload")
    elif program == "tensorboard":
        assert shutil.which("tensorboard")
        assert rest[0] == "--logdir"
    elif program in ("$EDITOR", ".ci/run"):
        assert all((place.folder / word).exists() for word in [*rest, *([program] if program == ".ci/run" else [])])
    else:
        assert program in ("git", "cd", "touch", "scancel", ".", "pre-commit"), f"nobody runs {program!r}"


@named(having("bash"))
def test_commands_run(
    page: Path, place: Place, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)

    def profiled() -> Path:
        return request.getfixturevalue("profiled")

    for block in blocks(page):
        if block.language == "bash" and not block.remark.startswith("not run: "):
            for words in commands(block):
                try:
                    run_command(words, place, profiled)
                except BaseException as error:
                    error.add_note(f"{page.name}, line {block.line}: {shlex.join(words)}")
                    raise


@named(TUTORIALS)
def test_a_tutorial_runs_from_its_first_block_to_its_last(
    page: Path, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    here = replace(place, folder=tmp_path, tutorial=True)
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.code, str(page), "exec"), names)
        elif not block.remark.startswith("not run: "):
            for words in commands(block):
                try:
                    run_command(words, here, lambda: pytest.fail("no tutorial has a profile"))
                except BaseException as error:
                    error.add_note(f"{page.name}, line {block.line}: {shlex.join(words)}")
                    raise


def test_every_block_is_run_or_says_why_not() -> None:
    for page in PAGES_AND_CHANGES:
        for block in blocks(page):
            where = f"{page.name}, line {block.line}"
            assert block.language in ("python", "bash", "text", "diff"), f"{where}: {block.language!r}"
            assert re.fullmatch(r"|not run: .+|run: on its own", block.remark), where
