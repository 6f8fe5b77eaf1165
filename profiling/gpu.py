"""All that only a GPU can show, in one command and at most 30 minutes: `make gpu`, or

    python -m profiling.gpu --plan     # the sections with their limits; needs no GPU
    python -m profiling.gpu            # writes everything to runs/gpu and ends in a table

Every section is a process with a limit of its own, so that one which fails or hangs costs only itself. Nothing is
installed and no network is needed; sections whose packages are missing are left out and say so. Exit status: 0 if
nothing failed, 1 if something did, 2 without a GPU. How to read it: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 30.0  # what the sections' limits come to
GRACE = 5.0  # seconds between SIGTERM and SIGKILL for a section that is over its limit

# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "torch_tb_profiler": "torch-tb-profiler",
    "pytest_timeout": "pytest-timeout",
    "sklearn": "scikit-learn",
}
CORE = ("torch", "transformers", "accelerate", "peft", "safetensors", "tqdm")
COMPARE = (*CORE, "matplotlib", "tensorboard")
MAIN_JOB = (*CORE, "datasets", "jsonargparse", "matplotlib", "psutil", "rich", "scipy", "sklearn", "tensorboard")
TESTS = (*MAIN_JOB, "pytest")
USEFUL = ("deepspeed", "triton", "torch_tb_profiler")  # tests are left out, one by one, where these are missing

LORAS = "floor lora miss adalora elora aflora_training aflora_half aflora_frozen"  # full fine-tuning takes 16 GB


@dataclass(frozen=True)
class Section:
    """One measurement, and the process that makes it.

    Args:
        name: Also its folder in --out; "{folder}" in the command stands for that.
        shows: What it is for, in the table.
        command: Arguments of the Python interpreter, in one line.
        seconds: After which it is ended.
        needs: Packages without which it is left out, by import name.
        environment: Further variables.
        result: Reads a line for the table from its folder and what it printed.
        files: Contents of JSON files that it finds in its folder.
    """

    name: str
    shows: str
    command: str
    seconds: float
    needs: tuple[str, ...] = CORE
    environment: dict[str, str] = field(default_factory=dict)
    result: Callable[[Path, str], str] = lambda folder, printed: ""
    files: dict[str, Any] = field(default_factory=dict)

    def arguments(self, folder: Path) -> list[str]:
        return [sys.executable, *(part.replace("{folder}", str(folder)) for part in self.command.split())]


@dataclass(frozen=True)
class Outcome:
    """What became of a section. `status`: passed, failed (why), or left out (why)."""

    section: Section
    status: str
    seconds: float = 0.0
    result: str = ""


def main(argv: list[str] | None = None) -> int:
    """Run the sections and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m profiling.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="list the sections, their limits and what is missing")
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all; the sections' limits scale with it")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    args = parser.parse_args(argv)
    complaint = without_gpu()
    if complaint and not args.plan:
        print(f"aflora: {complaint} `--plan` lists what would run.", file=sys.stderr)
        return 2
    chosen = sections(ranks=1 if complaint else gpus())
    if args.sections:
        if unknown := set(args.sections) - {section.name for section in chosen}:
            names = ", ".join(section.name for section in chosen)
            parser.error(f"no section {', '.join(sorted(unknown))}; there are {names}")
        chosen = [section for section in chosen if section.name in args.sections]
    print(packages(), flush=True)
    if args.plan:
        print(plan(chosen, args.out, args.minutes / MINUTES))
        return 0
    outcomes = run(chosen, args.out, args.minutes * 60)
    return int(any(outcome.status.startswith("failed") for outcome in outcomes))


def without_gpu() -> str:
    """Why nothing can be measured here; empty where there is a GPU."""
    if find_spec("torch") is None:
        return f"{sys.executable} has no PyTorch."
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} of {sys.executable} is built without CUDA: no GPU to measure on."
    return "There is no GPU here that PyTorch can use."


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def sections(ranks: int) -> list[Section]:
    """What is measured, the most telling first. Their limits come to 30 minutes at most.

    Args:
        ranks: GPUs over which the DeepSpeed sections spread; everything else runs on one.
    """
    compare = "-m profiling.compare --out {folder}"
    paper = f"{compare} --batch 64 --length 256"
    shapes = [
        Section(
            f"compare_{dtype}",
            f"methods side by side, DeBERTaV3-base's shape, 64 x 256 tokens, {dtype}",
            f"{paper} --dtype {dtype} --steps 8 --warmup 2",
            seconds=120,
            needs=COMPARE,
            result=compared,
        )
        for dtype in ("bf16", "tf32", "fp32")
    ]
    llama = Section(
        "compare_llama_1b",
        "methods side by side, a LLaMA's shape of 1B, 8 x 512 tokens, bf16",
        f"{compare} --model llama-1b --batch 8 --length 512 --dtype bf16 --steps 8 --warmup 2 --methods {LORAS}",
        seconds=120,
        needs=COMPARE,
        result=compared,
    )
    triton = [
        Section(
            f"triton_{state}",
            f"AFLoRA with the Triton kernels {state}, DeBERTaV3-base's shape, 64 x 256 tokens, bf16",
            f"{paper} --dtype bf16 --steps 15 --warmup 3 --methods floor aflora_training{option}",
            seconds=60,
            needs=(*COMPARE, "triton"),
            result=compared,
        )
        for state, option in (("off", ""), ("on", " --kernels"))
    ]
    memory = Section(
        "memory",
        "CUDA memory after each freeze, DeBERTaV3-base's shape, 16 x 128 tokens",
        "-m profiling.schedule --out {folder} --batch 16 --length 128 --steps-per-epoch 12",
        seconds=90,
        needs=COMPARE,
        result=freed,
    )
    tests = Section(
        "tests",
        "tests marked gpu: NCCL engines, loss scaling, offload, Trainer, kernels, a real trace",
        "-m pytest -m gpu -v -p no:cacheprovider tests/gpu tests/test_kernels.py",
        seconds=660,  # a dozen launches, each with its imports, and a compilation of DeepSpeed's CPU Adam
        needs=TESTS,
        result=lambda folder, printed: printed.strip().splitlines()[-1].strip("= ") if printed.strip() else "",
    )
    return [
        *shapes,
        tests,
        memory,
        llama,
        *triton,
        *(deepspeed(s, o, ranks) for s in (1, 2, 3) for o in (True, False)),
    ]


def deepspeed(stage: int, overlap: bool, ranks: int) -> Section:
    """The main job under a shipped DeepSpeed file, with communication beside the backward pass or after it."""
    settings = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    settings["zero_optimization"]["overlap_comm"] = overlap
    launcher = "--use_deepspeed --deepspeed_config_file {folder}/deepspeed.json --mixed_precision bf16"
    launcher += f" --zero3_init_flag {str(stage == 3).lower()} --num_machines 1 --num_processes {ranks}"
    state = "on" if overlap else "off"
    return Section(
        f"zero{stage}_overlap_{state}",
        f"main job under ZeRO-{stage} on {ranks} GPU{'s' * (ranks > 1)}, overlap {state}, BERT-base's shape, bf16",
        f"-m profiling.main_job {{folder}} {launcher}",
        seconds=75,
        needs=(*MAIN_JOB, "deepspeed"),
        result=examples_per_second,
        files={"deepspeed.json": settings},
    )


def run(chosen: Sequence[Section], out: Path, seconds: float) -> list[Outcome]:
    """Run sections one after the other, print the table, and write it to `out` (gpu.md, gpu.json).

    Args:
        chosen: In this order.
        out: Folder for all; made if need be. Each section has a folder in it, with its log.
        seconds: For all of them. A section's own limit is scaled as the sum of their limits is to this, if that
            makes it longer; sections for which no time is left fail.
    """
    out = out.resolve()  # sections run from the repository's root
    end = time.monotonic() + seconds
    scale = max(seconds / (MINUTES * 60), 1.0)
    outcomes: list[Outcome] = []
    try:
        for number, section in enumerate(chosen, start=1):
            print(f"[{number}/{len(chosen)}] {section.name}: {section.shows} ...", flush=True)
            outcomes.append(run_one(section, out / section.name, min(section.seconds * scale, end - time.monotonic())))
            print(f"    {outcomes[-1].status} {outcomes[-1].result}", flush=True)
            write(outcomes, out)  # whatever ends this process, what there is by then is there
    finally:
        print("\n" + table(outcomes))
        print(f"Everything is in {out}; a section's log is log.txt in its folder.")
    return outcomes


def run_one(section: Section, folder: Path, seconds: float) -> Outcome:
    """One section; whatever it does, an outcome and no process of it are left."""
    if missing := [name for name in section.needs if find_spec(name) is None]:
        return Outcome(section, f"left out: no {', '.join(missing)}")
    if seconds <= 0:
        return Outcome(section, "failed: no time was left for it")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in section.files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Everything is on this machine; a hub that cannot be reached would be tried again and again.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", **section.environment}
    log = folder / "log.txt"
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            section.arguments(folder),
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends it
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    took = time.monotonic() - began
    if code is None:
        return Outcome(section, f"failed: ended after its limit of {seconds:.0f} s", took)
    if code:
        return Outcome(section, f"failed: exit status {code}", took)
    try:
        return Outcome(section, "passed", took, section.result(folder, log.read_text(errors="replace")))
    except (OSError, LookupError, ValueError) as error:
        return Outcome(section, f"failed: its result cannot be read ({type(error).__name__}: {error})", took)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started; torchrun's ranks are in sessions of their own."""
    import psutil  # accelerate needs it, too

    try:
        first = psutil.Process(process.pid)
        family = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, GRACE)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what a launcher that ended by itself has left behind
    process.wait()


def compared(folder: Path, printed: str) -> str:
    methods = json.loads((folder / "compare.json").read_text())["methods"]
    ours = methods["aflora"]
    ratios = [f"{ours[f'ratio_to_{other}']:.2f} x {label}" for other, label in (("floor", "floor"), ("lora", "LoRA"))]
    ratios.append(f"ELoRA {1 / ours['ratio_to_elora']:.2f} x it")
    return f"AFLoRA over its schedule {ours['step_seconds_median'] * 1e3:.1f} ms a step, " + ", ".join(ratios)


def freed(folder: Path, printed: str) -> str:
    memory = json.loads((folder / "memory.json").read_text())
    held = [entry["allocated"] / 1e6 for entry in memory]
    rises = sum(later > earlier for earlier, later in pairwise(held))
    return f"{held[0]:.1f} MB before, {held[-1]:.1f} MB after {len(held) - 1} freezes; it rose at {rises} of them"


def examples_per_second(folder: Path, printed: str) -> str:
    result = json.loads((folder / "run" / "result.json").read_text())
    return f"{result['samples_per_second']:.0f} examples/s, {result['engine']} on {result['world_size']}"


def packages() -> str:
    """What is here and what is missing, in two lines."""
    names = list(dict.fromkeys((*TESTS, *USEFUL)))
    here, missing = [], []
    for name in names:
        distribution = DISTRIBUTIONS.get(name, name)
        if find_spec(name) is None:
            missing.append(distribution)
            continue
        try:
            here.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            here.append(distribution)
    python = f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    return f"Here: {python}, {', '.join(here)}.\nMissing: {', '.join(missing) or 'nothing'}."


def plan(chosen: Sequence[Section], out: Path, scale: float) -> str:
    lines = []
    for section in chosen:
        missing = [name for name in section.needs if find_spec(name) is None]
        left_out = f"  LEFT OUT: no {', '.join(missing)}" if missing else ""
        variables = [f"{name}={value}" for name, value in section.environment.items()]
        command = shlex.join(["python", *section.arguments(out / section.name)[1:]])
        lines.append(f"{section.name} ({section.seconds * scale:.0f} s): {section.shows}{left_out}")
        lines.append("    " + " ".join([*variables, command]))
    lines.append(f"At most {sum(section.seconds for section in chosen) * scale / 60:.1f} minutes in all.")
    return "\n".join(lines)


def table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| section | what it shows | outcome | result | s |", "|---|---|---|---|---|"]
    for o in outcomes:
        lines.append(f"| {o.section.name} | {o.section.shows} | {o.status} | {o.result} | {o.seconds:.0f} |")
    return "\n".join(lines)


def write(outcomes: Sequence[Outcome], out: Path) -> None:
    """gpu.md and gpu.json, as far as things have come."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.md").write_text(f"{packages()}\n\n{table(outcomes)}\n")
    rows = [
        {"section": o.section.name, "status": o.status, "result": o.result, "seconds": round(o.seconds, 1)}
        for o in outcomes
    ]
    (out / "gpu.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
