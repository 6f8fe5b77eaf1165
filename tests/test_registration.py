"""After `import aflora_dist` PEFT knows the method, whoever imports PEFT and when; it is not imported for that alone.

Each in a process of its own: what is imported stays imported. Those that really import PEFT are forked from one that
has imported transformers already; what is imported with this package alone is looked at in tests/view/test_light.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from aflora_dist import AFLoRAConfig
from tests.launch import ROOT


def python(code: str, *arguments: object, path: Path | None = None) -> str:
    """What the code prints; modules in `path` come before the installed ones."""
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    command = [sys.executable, "-c", dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Reads the code of each, forks, and says how it ended and what it printed.
FORKS = """
import json, os, sys, tempfile, traceback
import torch, transformers.models.auto.modeling_auto, transformers.models.bert.modeling_bert

assert not [name for name in sys.modules if name.startswith(("peft", "aflora"))]
for line in sys.stdin:
    code, arguments = json.loads(line)
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        sys.stdout.flush()
        if not (child := os.fork()):
            os.dup2(said.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv, status = ["-c", *arguments], 0
            try:
                exec(compile(code, "code", "exec"), {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitpid(child, 0)[1]
        said.seek(0)
        errors.seek(0)
        print(json.dumps([status, said.read(), errors.read()]), flush=True)
"""


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[..., str]]:
    """As `python`, in a process that has imported transformers."""
    # pyarrow's allocator would start a thread, which no fork takes along.
    environment = os.environ | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
    command, pipe = [sys.executable, "-c", FORKS], subprocess.PIPE

    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment) as server:

        def run(code: str, *arguments: object) -> str:
            assert server.stdin is not None
            assert server.stdout is not None
            print(json.dumps([dedent(code), list(map(str, arguments))]), file=server.stdin, flush=True)
            status, said, errors = json.loads(server.stdout.readline())
            assert status == 0, errors
            return said

        yield run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AFLoRA adapter in a folder, and the model that it names as its base."""
    folder = tmp_path_factory.mktemp("registration")
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    BertForSequenceClassification(config).save_pretrained(folder / "base")
    base = BertForSequenceClassification.from_pretrained(folder / "base")
    get_peft_model(base, AFLoRAConfig(r=2, task_type="SEQ_CLS")).save_pretrained(folder / "adapter")
    return folder


LOADED = """
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_config
from transformers import AutoModelForSequenceClassification

folder = sys.argv[1]
assert type(get_peft_config({"peft_type": "AFLORA", "r": 2})).__name__ == "AFLoRAConfig"
base = AutoModelForSequenceClassification.from_pretrained(folder + "/base")
for model in (
    PeftModel.from_pretrained(base, folder + "/adapter"),
    AutoPeftModelForSequenceClassification.from_pretrained(folder + "/adapter"),
):
    assert type(model.base_model).__name__ == "AFLoRAModel"
assert not any(type(finder).__module__.startswith("aflora_dist") for finder in sys.meta_path)
"""


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import peft, aflora_dist", id="after PEFT"),
        pytest.param("import aflora_dist; assert 'peft' not in sys.modules", id="before PEFT"),
        pytest.param("import aflora_dist; from transformers import Trainer", id="before transformers imports PEFT"),
        pytest.param("import aflora_dist.adapter.layer", id="by the adapter, which imports PEFT itself"),
        pytest.param(
            """
            class Plugin:
                def find_spec(self, name, path=None, target=None):
                    if name == "peft.tuners":
                        import aflora_dist

            sys.meta_path.insert(0, Plugin())
            """,
            id="in the middle of PEFT's import",
        ),
        pytest.param(
            """
            import threading, time, aflora_dist

            class Plugin:
                def find_spec(self, name, path=None, target=None):
                    if name == "peft.tuners":
                        threading.Thread(target=lambda: aflora_dist.AFLoRAConfig).start()
                        time.sleep(0.5)

            sys.meta_path.insert(0, Plugin())
            """,
            id="used by a thread while another imports PEFT",
        ),
    ],
)
def test_a_saved_adapter_loads_when_the_package_is_imported(
    imports: str, adapter: Path, forked: Callable[..., str]
) -> None:
    forked("import sys\n" + dedent(imports) + LOADED, adapter)


def test_without_the_package_the_folder_tells_what_to_import(adapter: Path, forked: Callable[..., str]) -> None:
    """PEFT asks nobody about a method that it does not know; nothing of this package can run then."""
    code = """
    import sys
    from peft import PeftConfig

    try:
        PeftConfig.from_pretrained(sys.argv[1] + "/adapter")
    except KeyError as error:
        print(error)
    """
    assert forked(code, adapter) == "'AFLORA'\n"
    assert '"import_first": "aflora_dist"' in (adapter / "adapter" / "adapter_config.json").read_text()
    assert "import aflora_dist  # before the adapter is loaded" in (adapter / "adapter" / "README.md").read_text()


# A peft that imports quickly; what it does is written into it by each test.
STANDIN = """
import sys
import aflora_dist
from aflora_dist import _registration

_registration._register = lambda: print("registered", sys.modules["peft"].whole)
"""


def standin(folder: Path, content: str) -> Path:
    (folder / "peft").mkdir()
    (folder / "peft" / "__init__.py").write_text(dedent(content))
    return folder


def test_asking_where_peft_is_neither_imports_it_nor_ends_the_watch(tmp_path: Path) -> None:
    code = """
    import inspect
    from importlib.machinery import SourceFileLoader
    from importlib.util import find_spec

    for _ in range(2):
        assert find_spec("peft").loader.get_filename("peft") == find_spec("peft").origin
    assert "peft" not in sys.modules
    print("asked")
    import peft

    assert "whole = True" in inspect.getsource(peft)
    assert type(peft.__loader__) is type(peft.__spec__.loader) is SourceFileLoader
    """
    assert python(STANDIN + dedent(code), path=standin(tmp_path, "whole = True")) == "asked\nregistered True\n"


@pytest.mark.parametrize("half", [False, True], ids=["looked for", "half imported"])
def test_a_peft_that_cannot_be_imported_says_so_itself_and_is_waited_for_further(half: bool, tmp_path: Path) -> None:
    """Half imported: it is peft itself that imports this package."""
    code = """
    import os

    for _ in range(TRIES):
        try:
            import peft
        except OSError as error:
            print(error)
    os.environ["REPAIRED"] = "1"
    import peft
    """
    content = """
    import os

    if "REPAIRED" not in os.environ:
        raise OSError("peft's own trouble")
    whole = True
    """
    tries = 1 if half else 2
    code, content = dedent(code).replace("TRIES", str(tries)), dedent(content)
    code, content = (code, STANDIN + content) if half else (STANDIN + code, content)
    assert python(code, path=standin(tmp_path, content)) == "peft's own trouble\n" * tries + "registered True\n"


def test_no_peft_at_all_is_not_found_as_ever() -> None:
    code = """
    sys.path[:] = [folder for folder in sys.path if "site-packages" not in folder]
    try:
        import peft
    except ModuleNotFoundError as error:
        print(error)
    """
    assert python(STANDIN + dedent(code)) == "No module named 'peft'\n"


def test_threads_see_peft_only_once_it_knows_the_method(tmp_path: Path) -> None:
    code = """
    import importlib, threading, time

    known = []
    _registration._register = lambda: (time.sleep(0.2), known.append(True))
    seen = []

    def use(start):
        start.wait()
        importlib.reload(aflora_dist)
        import peft

        seen.append(bool(known) and peft.whole)

    start = threading.Barrier(8)
    threads = [threading.Thread(target=use, args=(start,)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert seen == [True] * 8
    importlib.reload(aflora_dist)
    assert not any(isinstance(finder, _registration._PeftFinder) for finder in sys.meta_path)
    """
    python(STANDIN + dedent(code), path=standin(tmp_path, "import time; time.sleep(0.2); whole = True"))


def test_the_package_has_its_public_names_and_no_others() -> None:
    code = """
    import sys, aflora_dist

    assert set(aflora_dist.__all__) <= set(dir(aflora_dist))
    assert aflora_dist.AFLoRAError and "torch" not in sys.modules
    assert not hasattr(aflora_dist, "FreezingCallBack") and "torch" not in sys.modules
    from aflora_dist import *
    from aflora_dist.freezing import *

    for name in (*aflora_dist.__all__, *aflora_dist.freezing.__all__):
        assert name in globals(), name
    """
    python(code)
