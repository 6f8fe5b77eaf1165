"""`aflora predict`: its command line, and the story."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import AFLoRAError
from ..extras import require
from ..leaving import guarded
from ..notices import quiet_libraries

_DESCRIPTION = """Label a file, or have its prompts answered, row for row.

RUN is a run's directory, an adapter's folder (of any of PEFT's methods), a model's folder, or an adapter on the hub
(OWNER/NAME). FILE is CSV, TSV, JSON lines, JSON or parquet; OUT any of these, by the end of its name. All columns are
kept, and `prediction` comes behind them; with classes probability_CLASS for each, too.
On several processes: accelerate launch -m aflora_dist.predict RUN FILE [--out OUT]."""
_OPTIONS = """Options of `aflora train` go before those of the run: --data.text_columns review (one column, or two for
pairs), --data.label_column stars, --data.positive_label yes, --data.columns.prompt question, --data.max_length 512,
--data.pad_to_max_length true, --data.max_new_tokens 64, --data.system TEXT, --train.eval_batch_size 256, --model.name
/other/place/of/base, --model.trust_remote_code true, and revision, dtype, attn_implementation and quantize of model."""


def main(arguments: list[str] | None = None) -> int:
    """Predict a file; returns the exit status. What a user did wrong is said in a line or two."""
    quiet_libraries()
    given = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: _run(given), "prediction", "The same command goes on from what was done.")


def _run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="aflora predict",
        usage="%(prog)s RUN|ADAPTER FILE [--out OUT] [--overwrite] [--prefix TEXT] [--GROUP.KEY VALUE ...]",
        description=_DESCRIPTION,
        epilog=_OPTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN|ADAPTER", help="whose model predicts")
    parser.add_argument("file", type=Path, metavar="FILE", help="what is predicted")
    parser.add_argument("--out", type=Path, metavar="OUT", help="what is written; FILE with .predicted if not given")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is there")
    parser.add_argument("--prefix", default="", metavar="TEXT", help="what the names of the new columns begin with")
    args, options = parser.parse_known_args(arguments)
    require("train", "aflora predict")
    from .output import Output
    from .trained import find_trained

    output = Output(args.file.expanduser(), args.out and args.out.expanduser(), args.overwrite)
    trained = find_trained(args.run, options)
    _predict(output, trained, args.prefix)


def _predict(output: Any, trained: Any, prefix: str) -> None:
    """The story. A collective."""
    from tqdm.auto import tqdm

    from ..processes import launched_processes, on_main
    from ..training.build import create_accelerator
    from .asking import asking
    from .partial import Partial
    from .trained import for_ranks, load_trained

    quiet_libraries()  # DeepSpeed sets its own level on import
    accelerator = create_accelerator(for_ranks(trained.config, launched_processes()))
    asked = asking(str(output.file), trained)
    output.plain = asked.plain
    new = [prefix + name for name in asked.new]
    on_main(accelerator, lambda: output.check(asked.columns, new))
    model, tokenizer, limits = load_trained(trained, accelerator)
    asked.prepare(model, tokenizer, limits, accelerator)
    kept: list[Partial] = []  # on the main process

    def begin() -> int:
        kept.append(
            held.enter_context(closing(Partial(output.path, _identity(output.file, trained, asked.tokens, new))))
        )
        return kept[0].rows

    def go_on(start: int, done: Any) -> int:
        stop = min(start + asked.part, asked.rows)
        values = asked.predict(start, stop, done)
        on_main(accelerator, lambda: kept[0].append(values))
        return stop

    def end() -> None:
        output.write(asked.columns, new, kept[0].values)
        print(f"wrote {output.path}: {asked.rows:,} row{'s' if asked.rows > 1 else ''}, with {_listed(new)}")
        print(*asked.summary(kept[0].values), sep="\n", flush=True)
        kept[0].remove()

    with ExitStack() as held:
        start = on_main(accelerator, begin)
        if start and accelerator.is_main_process:
            print(f"Going on after row {start:,}, which an earlier call has come to.", flush=True)
        watched = accelerator.is_main_process
        bar = held.enter_context(
            closing(tqdm(total=asked.rows, initial=start, desc="predicting", unit=" rows", disable=not watched))
        )
        while start < asked.rows:
            start = go_on(start, bar.update)
        bar.close()
        on_main(accelerator, end)
    accelerator.end_training()


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"the new column{'s' if len(names) > 1 else ''} {shown}{f' and {len(names) - 4} more' if names[4:] else ''}"


def _identity(file: Path, trained: Any, tokens: Any, new: list[str]) -> str:
    """What a prediction hangs on: the file, as tokens too, the adapter and its base model, and how all are read."""
    from ..store.fingerprint import of_examples, of_settings, of_weights
    from ..tasks.model import resolve_name
    from ..version import __version__

    config = trained.config
    base = resolve_name(config.model.name, trained.says == "an answer"), config.model.revision
    held = [_digest(file), of_examples([tokens]), of_weights(*base), of_settings(*base)]
    held += [_digest(path) for path in sorted(trained.folder.glob("adapter_*.*")) if path.is_file()]
    settings = [asdict(config.model), asdict(config.data), new, trained.labels, __version__]
    return hashlib.sha256(json.dumps([held, settings], default=str).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AFLoRAError(f"{path} could not be read: {error.strerror or error}.") from None
