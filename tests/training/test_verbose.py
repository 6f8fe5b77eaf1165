"""What is silenced, and how it comes back."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest

from aflora_dist.notices import logger
from aflora_dist.training import loop
from aflora_dist.training.run import main


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_speak_where_that_is_asked_for(
    verbose: bool, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[bool] = []

    def speak(*_: Any) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn_explicit("goes away", FutureWarning, "library.py", 1, module="library")
        heard.extend([bool(caught), logging.getLogger("transformers").isEnabledFor(logging.WARNING)])

    logging.getLogger("transformers").setLevel(logging.WARNING)
    monkeypatch.setattr(loop, "train", speak)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main([*arguments, "--run.verbose", str(verbose).lower()]) == 0, capsys.readouterr().err
    assert heard == [verbose, verbose]


def test_what_the_package_says_is_said_once_and_is_the_logger_s(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger.warning("something")
    monkeypatch.setenv("RANK", "1")
    logger.warning("something else")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(logger, "disabled", True)
    logger.warning("nothing")
    assert capsys.readouterr().err == "aflora: warning: something\n"
