"""What language models are trained on: which columns are understood, which tokens carry loss, what is left out."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate import Accelerator

from aflora_dist import AFLoRAError
from aflora_dist.options import Config, DataConfig, ModelConfig, TrainConfig
from aflora_dist.tasks.sft import encode as encoding
from aflora_dist.tasks.sft.answers import Answer, last_number
from aflora_dist.tasks.sft.batching import IGNORED
from aflora_dist.tasks.sft.encode import Encoder, Note
from aflora_dist.tasks.sft.examples import load_examples, question, tools, turns
from aflora_dist.tasks.sft.problems import word_problems
from aflora_dist.tasks.sft.task import LanguageModelling
from aflora_dist.tasks.sft.template import PLAIN_TEMPLATE
from aflora_dist.training.command_line import parse
from tests.small_lm import make_small_language_model, make_small_tokenizer
from tests.tasks.chats import TEMPLATES, chat_tokenizer

# Without marks of what the assistant says, and with an end of each turn.
UNMARKED = (
    "{% for m in messages %}{{ '# ' + m['role'] + ' : ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant : ' }}{% endif %}"
)
FORGETFUL = "{% for m in messages %}{{ (m['content'] if loop.last else '?') + '</s>' }}{% endfor %}"
CHAT = [
    {"role": "user", "content": "how many apples ?"},
    {"role": "assistant", "content": "Ada has 3 ."},
    {"role": "user", "content": "and books ?"},
    {"role": "assistant", "content": "The answer is 4 ."},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encode(columns: dict[str, list[Any]], template: str | None = None, **options: Any) -> dict[str, list[Any]]:
    chosen: dict[str, Any] = {"max_length": 200, "loss_on": "completions", "system": None, "name": "it", **options}
    return Encoder(make_small_tokenizer(template), **chosen)(columns)


def carrying(encoded: dict[str, list[Any]], row: int = 0) -> str:
    """The text that carries loss."""
    return make_small_tokenizer().decode([label for label in encoded["labels"][row] if label != IGNORED])


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("template", [None, UNMARKED])
def test_all_the_assistant_s_turns_carry_loss_with_and_without_marks(template: str | None) -> None:
    found = encode({"messages": [CHAT]}, template)
    said = words(carrying(found).replace("</s>", " </s> "))
    assert said == [*words(CHAT[1]["content"]), "</s>", *words(CHAT[3]["content"]), "</s>"]
    assert found["count"] == [sum(label != IGNORED for label in found["labels"][0])]
    everything = encode({"messages": [CHAT]}, template, loss_on="all")
    assert everything["input_ids"] == found["input_ids"]
    assert everything["count"] == [len(found["input_ids"][0]) - 1]  # nothing comes before the first


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [CHAT[:2]]},
        {"prompt": [CHAT[0]["content"]], "completion": [CHAT[1]["content"]]},
        {"prompt": [CHAT[:1]], "completion": [CHAT[1:2]]},
        {"instruction": [CHAT[0]["content"]], "output": [CHAT[1]["content"]]},
        {"instruction": ["how many"], "input": ["apples ?"], "output": [CHAT[1]["content"]]},
    ],
)
def test_every_form_becomes_the_same_conversation(columns: dict[str, list[Any]]) -> None:
    found = encode(columns)
    assert carrying(found).replace(" ", "") == "Adahas3.</s>"
    if "input" not in columns:
        assert found["input_ids"] == encode({"messages": [CHAT[:2]]})["input_ids"]


def test_plain_text_carries_loss_to_its_end() -> None:
    found = encode({"text": ["Ada has 3 apples"]})
    assert found["input_ids"][0][-1] == 3
    assert found["count"] == [len(found["input_ids"][0]) - 1]


def test_a_long_text_becomes_several_examples_and_each_of_its_tokens_is_learned_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = " ".join(f"Ada has {i} apples ." for i in range(1, 60))
    (whole,) = encode({"text": [text]}, max_length=10_000)["input_ids"]
    monkeypatch.setattr(encoding, "_STRETCH", 50)
    encoder = Encoder(make_small_tokenizer(), 16, "completions", None, "it")
    longest = []
    inner = encoder.tokenizer

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def __call__(self, texts: Any, **options: Any) -> Any:
            longest.append(max(map(len, [texts] if isinstance(texts, str) else texts)))
            return inner(texts, **options)

    encoder.tokenizer = Watched()
    found = encoder({"text": [text, "Ada"]})
    assert max(longest) <= 50
    pieces = found["input_ids"][:-1]
    assert max(map(len, pieces)) == 16
    assert not any(found["cut"])
    assert [pieces[0][0], *(label for row in found["labels"][:-1] for label in row if label != IGNORED)] == whole
    assert found["input_ids"][-1] == encode({"text": ["Ada"]})["input_ids"][0]


def test_what_is_asked_ends_where_the_assistant_speaks() -> None:
    found = encode({"messages": [CHAT], "answer": [4]})
    asked, whole = found["prompt_ids"][0], found["input_ids"][0]
    assert whole[: len(asked)] == asked
    assert words(make_small_tokenizer().decode(whole[len(asked) :]))[:4] == ["The", "answer", "is", "4"]
    assert encode({"prompt": ["how many ?"], "answer": [4]})["count"] == [0]


def test_the_system_speaks_first_unless_it_has() -> None:
    system = [{"role": "system", "content": "answer"}]
    assert (
        encode({"messages": [[*system, *CHAT]]}, system="Ada")["input_ids"]
        == encode({"messages": [CHAT]}, system="answer")["input_ids"]
    )


def test_what_is_cut_is_told() -> None:
    whole = encode({"messages": [CHAT, CHAT[:2]]})
    short = len(whole["input_ids"][1])
    found = encode({"messages": [CHAT, CHAT[:2]]}, max_length=short)
    assert found["cut"] == [True, False]
    assert [len(ids) for ids in found["input_ids"]] == [short, short]


def test_a_template_that_does_not_tell_who_says_what_is_refused() -> None:
    with pytest.raises(AFLoRAError, match=r"it: the tokenizer's chat template writes earlier turns anew.*loss_on=all"):
        encode({"messages": [CHAT]}, FORGETFUL)
    with pytest.raises(AFLoRAError, match="it: column messages holds neither text nor a list"):
        encode({"messages": ["hello"]})
    assert "generation" in PLAIN_TEMPLATE


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_files_of_every_kind_are_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    table = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], "more": [1, 2, 3]})
    if suffix == ".parquet":
        table.to_parquet(str(path))
    elif suffix == ".csv":
        table.to_csv(str(path))
    else:
        path.write_text("\n".join(json.dumps(row) for row in table))
    train, held = load_examples(DataConfig(task="sft", train_file=str(path), validation_file=str(path)), seed=0)
    assert train.column_names == ["prompt", "completion"]
    assert held[2] == {"prompt": "c", "completion": "z"}
    train, held = load_examples(DataConfig(task="sft", train_file=str(path), hold_out=1), seed=0)
    assert (len(train), len(held)) == (2, 1)


def test_an_empty_completion_is_none() -> None:
    found = encode({"prompt": ["how many ?"] * 3, "completion": ["", None, "Ada"]})
    assert found["count"] == [0, 0, 2]  # rather than to learn to say nothing


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_a_turn_that_calls_a_tool_needs_no_content(content: dict[str, None]) -> None:
    turn = {"role": "assistant", **content, "tool_calls": [{"name": "add"}]}
    assert turns({"messages": [CHAT[0], turn]}, None)[1] == turn
    with pytest.raises(ValueError, match="whose content is no text"):
        turns({"messages": [CHAT[0], {**turn, "tool_calls": None}]}, None)


# As GLM's: whoever speaks next ends the turn.
ENDED_BY_THE_NEXT = (
    "{% for m in messages %}{{ ('<|im_start|>' if m.role == 'user' else '<|im_end|>') + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
)


@pytest.mark.parametrize(
    "turn",
    [
        {"content": ""},
        {"content": "  \n"},
        {"content": []},
        {"content": [{"type": "text", "text": ""}]},
        {"content": "no", "weight": 0},
        {"content": "no", "train": False},
        {"content": "no", "train": 0},
    ],
)
@pytest.mark.parametrize("template", [None, TEMPLATES["marked"][0], TEMPLATES["unmarked"][0], ENDED_BY_THE_NEXT])
def test_a_turn_that_says_nothing_or_is_marked_as_given_carries_no_loss(turn: dict[str, Any], template: str) -> None:
    encode = Encoder(chat_tokenizer("bytes", template), 100, "completions", None, "it")
    asked = {"role": "user", "content": "books ?"}
    alone = encode({"messages": [[asked, {"role": "assistant", **turn}]]})
    assert (alone["count"], Note.GIVEN in Note(alone["notes"][0])) == ([0], True)
    both = encode({"messages": [[asked, {"role": "assistant", **turn}, asked, {"role": "assistant", "content": "7"}]]})
    said = encode.tokenizer.decode([label for label in both["labels"][0] if label >= 0], skip_special_tokens=True)
    assert said.strip() == "7"


MARKS_THE_END = (  # as TRL's for Phi 3: more marks than turns
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
)


@pytest.mark.parametrize("template", [MARKS_THE_END, *(template for template, _, _ in TEMPLATES.values())])
def test_what_the_assistant_says_in_a_prompt_is_no_completion(template: str | None) -> None:
    """As TRL has it: one that goes on with a conversation is learned by its end."""
    encode = Encoder(chat_tokenizer("bytes", template), 200, "completions", None, "it")
    asked = [{"role": role, "content": said} for role, said in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    answer = {"role": "assistant", "content": "7"}
    for completion in ("7", [answer]):
        found = encode({"prompt": [asked], "completion": [completion]})
        whole = encode({"messages": [[*asked, answer]]})
        assert found["input_ids"] == whole["input_ids"]
        said = encode.tokenizer.decode([label for label in found["labels"][0] if label >= 0], skip_special_tokens=True)
        assert (said.strip(), Note.GIVEN in Note(found["notes"][0])) == ("7", True)
        assert whole["count"] > found["count"]
    asked[1]["train"] = True
    assert encode({"prompt": [asked], "completion": ["7"]})["count"] == whole["count"]


def test_weights_between_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a turn is learned \(1, true\) or not \(0, false\)"):
        turns({"messages": [CHAT[0], {"role": "assistant", "content": "7", "weight": 0.5}]}, None)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "text": "Ada"},
        {"role": "assistant", "value": "Ada", "content": None},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "user", "content": None, "id": "7"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"from": "gpt", "value": None, "model": "x"},
    ],
)
def test_a_turn_in_which_nothing_is_said_is_not_learned_as_silence(turn: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="whose content is no text"):
        turns({"messages": [CHAT[0], turn]}, None)


@pytest.mark.parametrize(
    "calls", ['[{"name": "f"}]', {"name": "f"}, 5, ["f"], [{"function": "f"}], [{"function": None}]]
)
def test_calls_that_are_none_are_refused(calls: Any) -> None:
    with pytest.raises(ValueError, match="column messages has tool_calls that are no list of"):
        turns({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": calls}]}, None)


def test_no_tools_are_none_however_they_are_written() -> None:
    assert [tools({"tools": none}) for none in (None, "", "[]", [])] == [None] * 4
    assert tools({"tools": '[{"name": "f"}]'}) == [{"name": "f"}]
    with pytest.raises(ValueError, match="column tools has a function that is no JSON schema"):
        tools({"tools": [{"type": "function", "function": "f"}]})


def test_the_hub_s_data_sets_are_taken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    split = datasets.Dataset.from_dict({"text": ["a", "b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": split, "test": split})
    train, held = load_examples(DataConfig(task="sft", name="someone/something"), seed=0)
    assert (train["text"][:], held["text"][:]) == (["a", "b"], ["a", "b"])


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"question": ["a"], "reply": ["b"]}, {}, r'columns question, reply, .*"messages".*"prompt" and "completion"'),
        ({"prompt": ["a"], "answer": [1]}, {}, r'columns prompt, answer, .*"instruction"'),
        ({"text": ["a", "b"]}, {"validation_file": None}, "data.hold_out how many of its 2 examples"),
        ({"text": ["a", "b"]}, {"hold_out": 2}, "data.hold_out=2 leaves nothing to train on: .* has 2 examples"),
        ({"text": ["a", "b"]}, {"name": "demo"}, "both given: name one"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_is(
    columns: dict[str, list[Any]], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    chosen = {"task": "sft", "train_file": str(path), "validation_file": str(path), **options}
    with pytest.raises(AFLoRAError, match=said):
        load_examples(DataConfig(**chosen), seed=0)


def test_what_is_held_out_serves_instead_of_data_for_evaluation(tmp_path: Path) -> None:
    for name, texts in (("train", ["a", "b", "c"]), ("other", ["x"])):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / f"{name}.parquet"))
    trained, other = (str(tmp_path / f"{name}.parquet") for name in ("train", "other"))
    config = DataConfig(task="sft", hold_out=1, train_file=trained, validation_file=other)
    train, held = load_examples(config, seed=0)
    assert sorted(row["text"] for row in [*train, *held]) == ["a", "b", "c"]
    assert len(held) == 1


@pytest.mark.parametrize(
    ("suffix", "content", "said"),
    [
        ("jsonl", '{"text": "a"}\n{"text": null}', r"line 2: it has nothing in column 'text'"),
        ("jsonl", '{"text": 1}', r"line 1: it has '1' in column 'text', which is not text"),
        (
            "jsonl",
            '{"prompt": "a", "completion": "b"}\n\n{"completion": "b"}',
            r"line 3: it has nothing in column 'prom",
        ),
        (
            "jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": {}}',
            r"line 2: column completion ",
        ),
        ("jsonl", '{"instruction": "a", "output": 5}', r"line 1: column output holds neither text nor a list"),
        (
            "jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": []}',
            r"line 2: nothing is said in it",
        ),
        (
            "jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": ["b"]}',
            r"line 2: column messages holds neither text n",
        ),
        (
            "jsonl",
            '{"messages": [{"role": "human", "content": "a"}]}',
            r"line 1: column messages has the role 'human'; roles",
        ),
        (
            "jsonl",
            '{"messages": [{"role": "Assistant", "content": "a"}]}',
            r"line 1: .* has the role 'Assistant'; roles",
        ),
        ("jsonl", '{"messages": [{"role": 1, "content": "a"}]}', r"line 1: column messages has the role 1; roles are"),
        (
            "jsonl",
            '{"messages": [{"role": "user", "content": 5}]}',
            r"line 1: .* a turn of the user whose content is no te",
        ),
        (
            "jsonl",
            '{"prompt": [{"role": "user"}], "completion": "b"}',
            r"line 1: column prompt has a turn of the user who",
        ),
        ("jsonl", '{"instruction": "a", "input": ["b"], "output": "c"}', r"line 1: column input holds no text"),
        ("jsonl", '{"instruction": 5, "input": "b", "output": "c"}', r"line 1: column instruction holds no text"),
        ("csv", "prompt,completion\na,b\nprompt,completion\nc,d\n", r"line 3: the header again"),
        ("csv", 'messages\n"[]"\n', r"line 2: column messages holds neither text nor a list"),
        ("csv", "prompt,completion,tools\na,b,[]\na,b,no JSON\n", r"line 3: column tools holds no JSON"),
        ("csv", "prompt,reply\na,b\n", r"has the columns prompt, reply, which are none"),
        ("csv", "prompt,completion\na, b,c\n", r"line 2: 3 fields, expected 2"),
    ],
)
def test_a_file_s_example_that_is_none_is_named_with_its_line(
    suffix: str, content: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_text(content)
    with pytest.raises(AFLoRAError, match=said):
        load_examples(DataConfig(task="sft", train_file=str(path), validation_file=str(path)), seed=0)


def test_chats_need_not_be_of_one_kind_and_cells_stay_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "b", "more": 1},
        {"prompt": [{"role": "user", "content": "c", "call": {"x": 1}}], "completion": None, "more": "y"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "d"}], "call": {"x": "z"}}]},
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = str(tmp_path / "chats.jsonl")
    for _ in range(2):
        train, _ = load_examples(DataConfig(task="sft", train_file=path, validation_file=path), seed=0)
        assert train[:] == {name: [row.get(name) for row in rows] for name in ("prompt", "completion")}
    (tmp_path / "cells.csv").write_text("prompt,completion,answer\n007,NA,1e5\nTrue,1.0,4\n")
    path = str(tmp_path / "cells.csv")
    train, held = load_examples(DataConfig(task="sft", train_file=path, hold_out=1), seed=0)
    assert {*train["prompt"], *held["prompt"]} == {"007", "True"}
    assert {*train["completion"], *held["completion"]} == {"NA", "1.0"}
    assert held.column_names == ["prompt", "completion", "answer"]


def test_answers_stay_where_sets_are_mixed_that_say_otherwise_what_an_example_is(tmp_path: Path) -> None:
    problems = [{"prompt": f"{n} ?", "completion": f"It is {n}.", "answer": n} for n in range(6)]
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"a{n}"}]} for n in "bc"]
    for name, rows in (("problems", problems), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, mix = str(tmp_path / "problems.jsonl"), {str(tmp_path / "chats.jsonl"): 1.0}
    train, held = load_examples(DataConfig(task="sft", train_file=first, mix=mix, hold_out=7), seed=0)
    assert train.column_names == ["messages", "tools"]
    right = {turns(row, None)[0]["content"]: row["answer"] for row in held}
    assert right == {said: None if said == "hi" else int(said[0]) for said in right}
    assert len(right) > 4


def test_what_is_cut_and_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "how many ?", "completion": "Ada"}] * 3
    rows += [{"prompt": "how many ? " * 30, "completion": "Ada"}, {"prompt": "Ada", "completion": "and " * 60}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = str(tmp_path / "train.jsonl")
    config = Config(
        model=ModelConfig(name=str(make_small_language_model(tmp_path / "model"))),
        data=DataConfig(task="sft", train_file=path, validation_file=path, max_length=64),
        train=TrainConfig(batch_size=4),
    )
    task, accelerator = LanguageModelling(config), Accelerator(cpu=True)
    task.load(accelerator)
    sampler, batches = task.batches(accelerator)
    said = capsys.readouterr().out
    assert "Of 5 examples of the training split: 2 cut to data.max_length=64 tokens; 1 left out: no token" in said
    assert task.train_examples == len(sampler.lengths) == 4
    assert all((batch["targets"] >= 0).all() for batch in batches)


def test_what_may_not_be_meant_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A template whose marks leave the end of the turn out, and a special token in what a user wrote."""
    ends_outside = (
        "{% for m in messages %}{{ '# ' + m.role + ' : ' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '</s>' }}{% endfor %}"
    )
    model = make_small_language_model(tmp_path / "model")
    make_small_tokenizer(ends_outside).save_pretrained(model)
    rows = [{"prompt": "how many ?", "completion": "Ada"}] * 3 + [{"prompt": "how </s> many ?", "completion": "Ada"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = str(tmp_path / "train.jsonl")
    config = Config(
        model=ModelConfig(name=str(model)),
        data=DataConfig(task="sft", train_file=path, validation_file=path, max_length=64),
        train=TrainConfig(batch_size=4),
    )
    task, accelerator = LanguageModelling(config), Accelerator(cpu=True)
    task.load(accelerator)
    task.batches(accelerator)
    assert (
        "Of 4 examples of the training split: 1 in whose messages special tokens are written, which are taken for "
        "such; in none '</s>', the end of a turn, carries loss."
    ) in capsys.readouterr().out


def test_answers_are_compared_by_their_last_number() -> None:
    assert [last_number(text) for text in ("3 * 4 = 12.", "$1,012.50 in all.", "no", 7.0, "-3")] == [
        12,
        1012.5,
        None,
        7,
        -3,
    ]
    assert [last_number(text) for text in (5e-05, 1e16, "1.5e-3 m", "from 3-5", "\u221212", "7e", "2e3x")] == [
        *map(Decimal, ("5e-05", "1e16", "1.5e-3", "5", "-12", "7", "3"))
    ]
    assert [last_number(text) for text in ("3,4", "1,000, he said", "1,234,567.5", "12,34", "1,00,000")] == [
        *map(Decimal, ("4", "1000", "1234567.5", "34", "100000"))
    ]
    assert [last_number(f"1e{sign}{'9' * digits}") for sign in ("", "-") for digits in (3, 25)] == [None] * 4
    assert Answer(0, "It is 0.00005 .", 5e-05).correct
    assert Answer(0, "It is 4 + 3 = 7.0 .", 7).correct
    assert not Answer(0, "It is 7 or 8", 7).correct
    assert not Answer(0, "who knows", 7).correct
    assert Answer(0, "0.3333333", 1 / 3).correct
    assert Answer(0, "It is 0.3", 0.1 + 0.2).correct
    for said, right in (
        ("1000001", 1000000),
        ("12345678", "12345670"),
        ("3,4", 34),
        ("0.0000009", 0),
        ("1e400", "2e400"),
    ):
        assert not Answer(0, said, right).correct


def test_what_is_shown_is_what_was_asked_last() -> None:
    assert question({"messages": CHAT}) == "and books ?"
    parts = [{"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": "books ?"}]
    assert question({"messages": [{"role": "user", "content": parts}]}) == "and books ?"
    assert question({"instruction": "how many", "input": "apples ?"}) == "how many\n\napples ?"


def test_made_up_problems_have_their_right_answers_and_share_none() -> None:
    train, test = word_problems(200, seed=0), word_problems(50, seed=1)
    assert not set(train["prompt"]) & set(test["prompt"])
    assert train[:] == word_problems(200, seed=0)[:]
    for row in train:
        assert last_number(row["completion"]) == row["answer"]
        *_, step = [part for part in row["completion"].split(".")[:-2] if "=" in part]
        formula, _, result = step.rpartition("=")
        assert eval(formula.split("are ")[-1].split("is ")[-1].split("gets ")[-1]) == int(result)


def test_presets_of_language_models_are_their_sources() -> None:
    config, _ = parse(["--preset", "llm/math10k", "--data.train_file", "math_10k.json"])
    assert (config.adapter.r, config.train.epochs, config.train.learning_rate) == (32, 3, 2e-3)
    assert config.adapter.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (config.freezing.shape, config.freezing.every, config.data.max_length) == ("quadratic", 10, 256)
    assert config.freezing.epochs(3) == (0.9, 0.9)  # 0.3 of all at either end
    config, _ = parse(["--preset", "sft/demo"])
    assert (config.data.task, config.data.name, config.model.name) == ("sft", "demo", "demo")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_the_template_leaves_out_are_told_of(key: str) -> None:
    encode = Encoder(chat_tokenizer("bytes", TEMPLATES["unmarked"][0]), 100, "completions", None, "it")
    turn = {"role": "assistant", "content": "7", key: "3 and 4"}
    found = encode({"messages": [[{"role": "user", "content": "3 + 4"}, turn]]})
    assert Note.LEFT_OUT in Note(found["notes"][0])


# As Qwen3's: an earlier turn is written without its thoughts.
FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_last_turn_that_is_given_leaves_out_an_earlier_one_that_is_written_anew() -> None:
    encode = Encoder(chat_tokenizer("bytes", FORGETS), 100, "completions", None, "it")
    asked = {"role": "user", "content": "3 + 4"}
    earlier = {"role": "assistant", "content": "7", "reasoning_content": "three and four"}
    chat = [asked, earlier, asked, {"role": "assistant", "content": "8", "weight": 0}]
    assert encode({"messages": [chat]})["count"] == [0]
