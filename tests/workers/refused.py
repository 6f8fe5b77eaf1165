"""Asks the hub that HF_ENDPOINT names for models in all the ways that commands do; prints what each is told.

python -m tests.workers.refused [TOKEN:]OWNER/NAME[@REVISION] ...
"""

from __future__ import annotations

import json
import os
import sys

from aflora_dist import AFLoRAError
from aflora_dist.options import ModelConfig
from aflora_dist.serve.base import find_base
from aflora_dist.tasks.model import load_base, load_tokenizer, outline_base


def main(names: list[str]) -> None:
    for asked in names:
        token, _, repository = asked.rpartition(":")
        os.environ["HF_TOKEN"] = token
        name, _, revision = repository.partition("@")
        config = ModelConfig(name=name, revision=revision or None)
        for ask in (
            lambda config=config: load_base(config, ["no", "yes"]),
            lambda config=config: outline_base(config, ["no", "yes"]),
            lambda config=config: load_tokenizer(config),
            lambda config=config: find_base(config.name, config.revision),
        ):
            try:
                ask()
                said = "found"
            except AFLoRAError as error:
                said = str(error)
            print(json.dumps([asked, said]))


if __name__ == "__main__":
    main(sys.argv[1:])
