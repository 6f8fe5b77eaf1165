"""Texts are tokenized once on a node and kept; what is found again is what the tokenizer would make now."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate import Accelerator
from transformers import AutoTokenizer, DataCollatorWithPadding

from aflora_dist import AFLoRAError
from aflora_dist.options import Config
from aflora_dist.tasks import kept, tokens
from aflora_dist.tasks.batches import create_loaders, lengths, loader
from aflora_dist.tasks.data import Data
from aflora_dist.tasks.kept import put_in_place
from aflora_dist.tasks.limits import Limits
from aflora_dist.tasks.sampler import GlobalBatchSampler
from aflora_dist.tasks.tokens import tokenized
from tests.launch import ROOT, launch
from tests.small import WORDS, make_tiny_model

ROWS = 150


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, path: Path) -> None:
        self.inner = AutoTokenizer.from_pretrained(path)
        self.texts = 0
        self.lowest = 0  # added to each token: a behaviour that its files do not show

    def __call__(self, *texts: list[str], **options: Any) -> dict[str, Any]:
        self.texts += len(texts[0])
        found = dict(self.inner(*texts, **options))
        return {**found, "input_ids": [[self.lowest + token for token in row] for row in found["input_ids"]]}

    def save_pretrained(self, folder: str) -> None:
        self.inner.save_pretrained(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "aflora"


def data(rows: int = ROWS, word: str = "good") -> datasets.Dataset:
    texts = [" ".join([word, *(WORDS[i % 7 :])]) for i in range(rows)]
    return datasets.Dataset.from_dict({"text": texts, "text_pair": texts[::-1], "label": [i % 2 for i in range(rows)]})


def expected(path: Path, dataset: datasets.Dataset, max_length: int = 64) -> list[list[int]]:
    """One text after the other."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [
        tokenizer(row["text"], row["text_pair"], truncation=True, max_length=max_length)["input_ids"] for row in dataset
    ]


def check(found: datasets.Dataset, path: Path, dataset: datasets.Dataset, max_length: int = 64) -> None:
    assert list(found["input_ids"]) == expected(path, dataset, max_length)
    assert list(found["labels"]) == list(dataset["label"])
    assert "text" not in found.column_names
    assert lengths(found, 1) == [len(row) for row in found["input_ids"]]
    assert lengths(found, 8) == [-(-len(row) // 8) * 8 for row in found["input_ids"]]


def test_tokens_are_made_once_and_then_read_from_the_file(tiny_model: Path, cache: Path) -> None:
    dataset = data().shuffle(seed=1)
    first, second = Counting(tiny_model), Counting(tiny_model)
    for tokenizer in (first, second):
        found = tokenized(dataset, tokenizer, 64, "texts")
        check(found, tiny_model, dataset)
        assert [Path(file["filename"]).parent for file in found.cache_files] == [cache]  # memory-mapped
    assert first.texts - second.texts == ROWS
    assert len(list(cache.iterdir())) == 1  # nothing is left from making it


class Logging(Counting):
    """Writes down which process made how many tokens' rows, and gives up at a text, or its process does."""

    def __init__(self, path: Path, log: Path, stop: str = "", how: str = "raise") -> None:
        super().__init__(path)
        self.log, self.stop, self.how = log, stop, how

    def __call__(self, *texts: list[str], **options: Any) -> dict[str, Any]:
        if len(texts[0]) != tokens._PROBED:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()} {len(texts[0])}\n")
            if self.stop in texts[0]:
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise AFLoRAError("a text that cannot be tokenised")
        return super().__call__(*texts, **options)

    def made(self) -> tuple[int, int]:
        """How many processes made how many rows, since the last call."""
        rows = [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return len({process for process, _ in rows}), sum(int(number) for _, number in rows)


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_large_data_are_tokenised_by_several_processes_and_what_is_done_is_kept(
    how: str, tiny_model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_PART", 20)
    monkeypatch.setattr(tokens, "_cores", lambda: 2)
    columns = data().shuffle(seed=1).to_dict()
    columns["text"][-1] = "the last of all"
    dataset = datasets.Dataset.from_dict(columns)
    log = tmp_path / "log"
    interrupted = Logging(tiny_model, log, "the last of all", how)
    with pytest.raises(AFLoRAError, match="a text that cannot" if how == "raise" else "ended from outside.*is kept"):
        tokenized(dataset, interrupted, 64, "texts")
    processes, rows = interrupted.made()
    assert processes == 2
    done = len(list(cache.glob("*.arrow")))
    assert 1 < done < 8
    assert len(list(cache.iterdir())) == done  # no half file
    assert rows >= 20 * done
    again = Logging(tiny_model, log)
    check(tokenized(dataset, again, 64, "texts"), tiny_model, dataset)
    assert again.made()[1] == ROWS - 20 * done
    check(tokenized(dataset, again, 64, "texts"), tiny_model, dataset)
    assert again.made() == (0, 0)
    assert len(list(cache.glob("*.arrow"))) == 8


def test_what_tokens_depend_on_is_told_apart(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    path = make_tiny_model(tmp_path / "model")

    def count(files: int, dataset: datasets.Dataset, max_length: int = 64) -> None:
        check(tokenized(dataset, AutoTokenizer.from_pretrained(path), max_length, "texts"), path, dataset, max_length)
        assert len(list(cache.iterdir())) == files

    count(1, data())
    count(2, data(word="bad"))  # as many texts, as long
    count(3, data(), max_length=9)
    for file in path.glob("tokenizer*"):
        file.unlink()
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *reversed(WORDS)]))
    count(4, data())  # another tokenizer at the same path
    odd = Counting(path)
    odd.lowest = 1  # another one with the same files
    found = tokenized(data(), odd, 64, "texts")
    assert list(found["input_ids"]) == [[1 + token for token in row] for row in expected(path, data())]


def test_tokens_that_other_code_made_are_not_used(
    tiny_model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    other = shutil.copytree(Path(kept.__file__).parent, tmp_path / "tasks")
    files = []
    for _ in range(2):  # as they are, and after a line has changed in what encodes chats
        monkeypatch.setattr(kept, "__file__", str(other / "kept.py"))
        kept.code.cache_clear()
        tokenized(data(), tokenizer, 64, "texts")
        files.append(len(list(cache.iterdir())))
        with (other / "sft" / "encode.py").open("a") as file:
            file.write("# mended\n")
    kept.code.cache_clear()
    assert files == [1, 2]
    monkeypatch.setattr(kept, "version", lambda name: "another release")
    tokenized(data(), tokenizer, 64, "texts")
    kept.code.cache_clear()
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("how", ["no folder", "cut", "rows"])
def test_a_cache_that_cannot_be_used_is_done_without(
    how: str, tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if how == "no folder":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/aflora")  # not even root may write there
    else:
        tokenized(data(), tokenizer, 64, "texts")
        (kept,) = cache.iterdir()
        if how == "cut":
            kept.write_bytes(kept.read_bytes()[:1000])
        else:
            shorter = data(ROWS - 1).map(lambda row: {"labels": row["label"]}, cache_file_name=str(cache / "x.arrow"))
            os.replace(shorter.cache_files[0]["filename"], kept)
    assert capsys.readouterr().err == ""
    check(tokenized(data(), tokenizer, 64, "the training split"), tiny_model, data())
    said = capsys.readouterr().err
    assert said.startswith("The tokens of the training split are not kept: ")
    assert len(said.splitlines()) == 1


def test_two_runs_may_make_the_same_tokens_at_the_same_time(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    together = threading.Barrier(2)

    class Waiting(Counting):
        def __call__(self, *texts: list[str], **options: Any) -> dict[str, Any]:
            if self.texts == tokens._PROBED:  # the first batch after the probe: both found no file
                together.wait(timeout=60)
            return super().__call__(*texts, **options)

    found: list[datasets.Dataset] = []

    def run() -> None:
        found.append(tokenized(data(), Waiting(tiny_model), 64, "texts"))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for one in found:
        check(one, tiny_model, data())
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_another_run_reads_is_never_taken_away(
    links: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, kept = tmp_path / "made", tmp_path / "kept"
    made.write_text("tokens")
    if links:
        kept.write_text("tokens")
        number = kept.stat().st_ino
        put_in_place(made, kept)
        assert kept.stat().st_ino == number
    else:

        def link(*paths: Path) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", link)
        put_in_place(made, kept)
        assert kept.read_text() == "tokens"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_for_people_who_would_wait(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for rows, seen, patience, shown in (
        (10, Terminal(), tokens._PATIENCE, False),
        (20, Terminal(), 0.0, True),
        (30, io.StringIO(), 0.0, False),
    ):
        monkeypatch.setattr(tokens, "_PATIENCE", patience)
        monkeypatch.setattr(sys, "stderr", seen)
        tokenized(data(rows), tokenizer, 64, "the training split")
        assert ("tokenizing the training split" in seen.getvalue()) is shown
        assert shown or seen.getvalue() == ""


def test_processes_are_forked_safely_after_a_tokenizer_has_used_threads(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A forked process has none of the threads, and would wait for them for ever."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenized(data(), tokenizer, 64, "texts")
    forked = multiprocessing.get_context("fork").Process(target=tokenizer, args=(data()["text"][:],))
    forked.start()
    forked.join(timeout=30)
    forked.kill()
    forked.join()
    assert forked.exitcode == 0
    assert "fork" not in capfd.readouterr().err  # the tokenizers' warning


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # there is no GPU to pin memory for
def test_batches_prepared_beside_the_training_are_the_same(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = tokenized(data(), tokenizer, 64, "texts")

    def drawn(beside: bool) -> list[list[Any]]:
        sampler = GlobalBatchSampler(lengths(found, 1), 16, micro_batches=2, rank=1, world_size=2, seed=0)
        batches = loader(found, sampler, DataCollatorWithPadding(tokenizer), beside)
        assert (batches.num_workers, batches.pin_memory) == (int(beside), beside)
        epochs = []
        for sampler.epoch, sampler.start in ((0, 3), (1, 0), (2, 0)):
            epochs.append([{name: value.tolist() for name, value in batch.items()} for batch in batches])
        return epochs

    assert drawn(beside=True) == drawn(beside=False)


def test_a_cpu_prepares_its_batches_itself(tiny_model: Path) -> None:
    whole = Data("reviews", data(), {"validation": data(20)}, ["bad", "good"], ("accuracy",))
    tokenizer, limits = AutoTokenizer.from_pretrained(tiny_model), Limits("tiny", 512, 19, 2)
    _, batches, evaluation = create_loaders(Config(), whole, tokenizer, limits, Accelerator(cpu=True))
    assert [(each.num_workers, each.pin_memory) for each in (batches, evaluation["validation"])] == [(0, False)] * 2


@pytest.mark.distributed
def test_the_first_process_goes_first_and_who_fails_ends_all_with_the_reason() -> None:
    done = launch("ddp", 2, str(ROOT / "tests" / "workers" / "first.py"), timeout=120)
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert said == [
        "rank 0, failing 0: ZeroDivisionError: an oversight, tried by 0",
        "rank 0, failing 1: AFLoRAError: Rank 1 failed: ZeroDivisionError: an oversight, tried by 0 1",
        "rank 0, failing None: fine, tried by 0 1",
        "rank 0, refusing 0: AFLoRAError: what is wrong, tried by 0",
        "rank 1, failing 0: AFLoRAError: Rank 0 failed: ZeroDivisionError: an oversight, tried by 0",
        "rank 1, failing 1: ZeroDivisionError: an oversight, tried by 0 1",
        "rank 1, failing None: fine, tried by 0 1",
        "rank 1, refusing 0: AFLoRAError: what is wrong, tried by 0",
    ]
