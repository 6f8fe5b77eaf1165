"""The documentation's own pictures: `python docs/pictures.py runs/demo`, after `make demo`.

All from one run: what `aflora show` prints of it, as a terminal has it, and its figures. Without a run, Eq. 5 alone,
drawn by the schedule that trains. What is measured draws its own: `python -m profiling.compare` and others.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path
from unittest import mock

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console

from aflora_dist.freezing import CubicSchedule
from aflora_dist.view import examples
from aflora_dist.view.show import Run, print_run, write_figures

IMAGES = Path(__file__).resolve().parent / "images"
# The paper's Table 5 with 57 updates an epoch: t_i is 1 epoch, t_f 14, T 20.
SCHEDULE = CubicSchedule(total_steps=1140, initial_steps=57, final_steps=798)
# DeBERTaV3-base, as `pytest tests/adapter` counts it: feed-forward matrices, their elements, the vectors, LoRA r=8.
MATRICES, ELEMENTS, VECTORS, LORA = 48, 368_640, 83_232, 1_327_104
_TRAINS, _STAYS, _GREY = "#3f51b5", "#2a9d8f", "#8a8f98"


def freezing(schedule: CubicSchedule = SCHEDULE) -> Figure:
    """r(t), what trains when, and how much of it there is, over the same axis."""
    T, t_i = schedule.total_steps, schedule.initial_steps
    all_frozen = T - schedule.final_steps
    counts = [schedule.count(t, MATRICES) for t in range(T)]
    when = [next(t for t in range(T) if counts[t] > n) for n in range(MATRICES)]
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    share, bars, size = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1.9, 1.2))
    for axis in (share, bars, size):
        axis.axvspan(t_i, all_frozen, color=_TRAINS, alpha=0.07, linewidth=0)
        axis.spines[["top", "right"]].set_visible(False)

    rising = range(t_i, all_frozen + 1, 3)
    share.plot([0, *rising, T], [0, *(schedule.fraction(t) for t in rising), 1], color=_TRAINS, linewidth=2)
    share.set(ylim=(0, 1.35), yticks=(0, 1), ylabel="frozen, r(t)")
    for x, text in ((t_i, "$t_i$"), (all_frozen, "$T - t_f$"), (T, "$T$")):
        share.text(x, 1.15, text, ha="center", fontsize=10)
    share.text(all_frozen + 14, 0.35, "from $t_i$ to $T - t_f$ the lowest scores freeze, step by step;\n"
               "afterwards only the vectors and the head train")  # fmt: skip

    bars.barh(range(MATRICES), when, height=0.72, color=_TRAINS, label="a projection matrix, A or B, until it freezes")
    bars.barh([MATRICES + 4], [T], height=5, color=_STAYS, label="the vectors $s_d$ and $s_b$, and the head")
    bars.set(yticks=(), ylabel="what trains")
    bars.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.4))

    trained = [VECTORS + ELEMENTS * (1 - n / MATRICES) for n in range(MATRICES + 1)]
    size.stairs(trained, [0, *when, T], baseline=0, fill=True, color=_TRAINS, alpha=0.3, linewidth=0)
    size.stairs(trained, [0, *when, T], baseline=None, color=_TRAINS, linewidth=1.5)
    size.axhline(LORA, color=_GREY, linestyle="--", linewidth=1)
    size.text(T, LORA * 0.96, f"LoRA r=8: {LORA:,}", ha="right", va="top", color=_GREY)
    size.text(4, trained[0], f"{trained[0]:,.0f}", ha="left", va="bottom", color=_TRAINS)
    size.text(T, trained[-1], f"{trained[-1]:,.0f}", ha="right", va="bottom", color=_TRAINS)
    size.set(ylim=(0, LORA * 1.1), yticks=(), xlim=(0, T), xlabel="t, global batches", ylabel="trainable")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """As SVG with its text as text: the same bytes for the same figure."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "aflora"}):
        figure.savefig(path, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def terminal(run: Run, path: Path, width: int = 92) -> Path:
    """What `aflora show` prints of a run, as an SVG that fetches no font."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    print_run(run, console)
    return _as_svg(console, f"aflora show runs/{run.path.name}", path)


def _as_svg(console: Console, title: str, path: Path) -> Path:
    drawn = console.export_svg(title=title)
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    drawn = drawn.replace("font-family: Fira Code, monospace", "font-family: ui-monospace, Menlo, Consolas, monospace")
    path.write_text(drawn)
    return path


def given(chats: Path, path: Path, width: int = 92) -> Path:
    """What `aflora data` prints of a file of chats, likewise."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with mock.patch.object(examples, "create_console", return_value=console):
        examples.main([str(chats), "--show", "1", "--data.max_length", "128", "--train.batch_size", "16"])
    return _as_svg(console, f"aflora data {chats.name} --show 1", path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="docs/pictures.py", description="Draw the documentation's pictures.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the directory of the demo's run")
    parser.add_argument("--chats", type=Path, metavar="FILE", help="chats, to show what a training would be given")
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder")
    args = parser.parse_args(argv)
    drawn = [save(freezing(), args.out / "freezing.svg")]
    if args.run is not None:
        run = Run(args.run)
        drawn += [terminal(run, args.out / "run.svg"), *write_figures(run, args.out, "png")]
    if args.chats is not None:
        drawn.append(given(args.chats, args.out / "data.svg"))
    print(*(f"wrote {path}" for path in drawn), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
