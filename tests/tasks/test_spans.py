"""The tokens that carry loss are those of what the assistant says and of the end of its turn, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import trl.chat_template_utils as trl_templates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from aflora_dist import AFLoRAError
from aflora_dist.tasks.sft.batching import IGNORED
from aflora_dist.tasks.sft.encode import Encoder, Note
from tests.tasks.chats import KINDS, LOSSLESS, SPECIAL, TEMPLATES, chat_tokenizer, made, written

PARTS_OF_TEXT = [
    "yes",
    "The answer is 14.",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "!\n",
    "é",
    "😀",
    "你好",
    "\t",
    "ß",
    "5",
    "'s",
]
TEXTS = st.lists(st.sampled_from(PARTS_OF_TEXT), max_size=6).map("".join)


@st.composite
def chats(draw: Any) -> list[dict[str, Any]]:
    roles = draw(st.sampled_from(["ua", "uaua", "sua", "uuaa", "au", "aua", "uauaua", "suau"]))
    names = {"u": "user", "a": "assistant", "s": "system"}
    found: list[dict[str, Any]] = [{"role": names[role], "content": draw(TEXTS)} for role in roles]
    for turn in found:
        weight = draw(st.sampled_from([None, None, None, None, 0, 1]))
        if turn["role"] == "assistant" and weight is not None:
            turn["weight"] = weight
    return found


def encoder(kind: str, template: str | None) -> Encoder:
    return Encoder(chat_tokenizer(kind, template), 10_000, "completions", None, "it")


def bare(text: str) -> str:
    return "".join(text.split())


def bytes_of(kind: str) -> dict[int, bytes]:
    """Of each token: ByteLevel writes a byte as a printable character, in the order of its alphabet's code points."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    written_as = {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert set(written_as) == set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = made(kind).get_vocab(with_added_tokens=True)
    return {
        number: token.encode() if token in SPECIAL else bytes(written_as[c] for c in token)
        for token, number in vocabulary.items()
    }


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["bytes", "bytes, trimmed", "bytes, trimmed, as GPT-4 splits", "RoBERTa"]),
    template=st.sampled_from(sorted(TEMPLATES)),
    chat=chats(),
)
def test_a_token_carries_loss_if_its_bytes_are_the_assistant_s(
    kind: str, template: str, chat: list[dict[str, str]]
) -> None:
    """Where tokens are bytes of the text one after the other, which are whose is counted, without any offsets."""
    found = encoder(kind, TEMPLATES[template][0])({"messages": [chat]})
    pieces = written(template, chat)
    owners = [said for text, said in pieces for _ in text.encode()]
    turns = [i for i, (text, _) in enumerate(pieces) for _ in text.encode()]
    text = "".join(text for text, _ in pieces).encode()
    lengths = bytes_of(kind)
    place, joined = 0, False
    for i, (token, label) in enumerate(zip(found["input_ids"][0], found["labels"][0], strict=True)):
        end = place + len(lengths[token])
        assert text[place:end] == lengths[token]
        beyond = b"".join(text[at : at + 1] for at in range(place, end) if turns[at] != turns[place])
        carries = owners[place] and not beyond.strip()
        assert (label != IGNORED) == (carries and i > 0), (text[place:end], pieces)
        if not owners[place]:
            joined = joined or bool(b"".join(text[at : at + 1] for at in range(place, end) if owners[at]).strip())
        place = end
    assert place == len(text)
    assert (Note.JOINED in Note(found["notes"][0])) == joined


@settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(sorted(KINDS)), template=st.sampled_from(sorted(TEMPLATES)), chat=chats())
def test_what_carries_loss_is_decoded_to_what_the_assistant_says(
    kind: str, template: str, chat: list[dict[str, str]]
) -> None:
    encode = encoder(kind, TEMPLATES[template][0])
    found = encode({"messages": [chat]})
    pieces = written(template, chat)
    if Note.JOINED in Note(found["notes"][0]) or (pieces[0] == ("", False) and chat[0]["role"] == "assistant"):
        return  # a word has the end of what stands before it; the very first token is never learned
    said = [text for text, spoken in pieces if spoken]
    carrying = encode.tokenizer.decode([label for label in found["labels"][0] if label != IGNORED])
    if kind in LOSSLESS and "Metaspace" not in kind:
        assert bare(carrying) == bare("".join(said))
    else:  # it writes some letters otherwise, or not at all
        alone = [
            encode.tokenizer.decode(encode.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said
        ]
        assert bare(carrying) == bare("".join(alone))


MARKED = [  # TRL 1.0 had templates for training without marks
    name
    for name in sorted(dir(trl_templates))
    if name.endswith("_training_chat_template") and "{% generation" in str(getattr(trl_templates, name))
]
UNMARKED = ("qwen2_5_chat_template", "gemma_chat_template", "glm4moe_chat_template")
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "The answer is 14."},
]


@pytest.mark.parametrize("name", MARKED)
def test_transformers_and_trl_agree_on_trl_s_templates(name: str) -> None:
    """Whose texts begin and end with no blank, with a tokenizer whose offsets leave none out; on the same day."""
    template = getattr(trl_templates, name)
    encode = encoder("bytes", template)
    chat = [encode.template.fitted(turn) for turn in CHAT]
    told = encode.tokenizer.apply_chat_template(
        chat, chat_template=encode.template.source, return_dict=True, return_assistant_tokens_mask=True
    )
    found = encode({"messages": [CHAT]})
    assert found["input_ids"] == [told["input_ids"]]
    assert [label != IGNORED for label in found["labels"][0]] == [bool(one) for one in told["assistant_masks"]]
    assert found["count"][0] > 0


@pytest.mark.parametrize("name", [name for name in UNMARKED if hasattr(trl_templates, name)])
def test_trl_agrees_on_what_is_a_completion(name: str) -> None:
    """What comes after the tokens of the prompt, where these begin those of the whole."""
    encode = encoder("bytes", getattr(trl_templates, name))
    whole, asked = [
        encode.tokenizer.apply_chat_template(chat, return_dict=True, add_generation_prompt=ask)["input_ids"]
        for chat, ask in ((CHAT[:2], False), (CHAT[:1], True))
    ]
    assert whole[: len(asked)] == asked
    found = encode({"prompt": [CHAT[0]["content"]], "completion": [CHAT[1]["content"]]})
    assert found["labels"] == [[IGNORED] * len(asked) + whole[len(asked) :]]


def test_marks_that_are_changed_afterwards_are_refused() -> None:
    trimmed = (
        "{% for m in messages %}{% set said %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
        "{{ said | trim | upper }}</s>{% endfor %}"
    )
    ends_in_a_blank = [CHAT[0], {"role": "assistant", "content": "yes "}]
    with pytest.raises(AFLoRAError, match=r"it: the chat template changes what it has written between its \{% generat"):
        encoder("bytes", trimmed)({"messages": [ends_in_a_blank]})


def test_offsets_that_are_wrong_are_noticed() -> None:
    encode = encoder("bytes", TEMPLATES["unmarked"][0])
    whole = encode._tokens

    def shifted(texts: list[str], **options: Any) -> Any:
        tokens = whole(texts, **options)
        tokens["offset_mapping"] = [[(a + 3, b + 3) for a, b in row] for row in tokens["offset_mapping"]]
        return tokens

    encode._tokens = shifted  # type: ignore[method-assign]
    with pytest.raises(AFLoRAError, match="does not tell which tokens stand for what the assistant says"):
        encode({"messages": [CHAT]})


PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
TAKES_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WRITES_JSON = (  # LFM2's
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("chat", [CHAT, PARTS])
@pytest.mark.parametrize(
    "template", [TAKES_PARTS, WRITES_JSON, *(TEMPLATES[name][0] for name in ("plain", "marked", "unmarked"))]
)
def test_texts_and_parts_of_text_are_the_same(template: str | None, chat: list[dict[str, Any]]) -> None:
    found = encoder("bytes", template)({"messages": [chat]})
    assert found == encoder("bytes", template)({"messages": [CHAT if chat is PARTS else PARTS]})
    said = encoder("bytes", template).tokenizer.decode(found["input_ids"][0])
    assert "how are you?" in said
    assert "type" not in said


def test_what_a_tool_returns_is_json_where_it_is_no_text() -> None:
    returned = {"role": "tool", "content": [{"degrees": 21}]}
    encode = encoder("bytes", WRITES_JSON)
    found = encode({"messages": [[CHAT[0], returned, CHAT[1]]]})
    assert '[{"degrees": 21}]' in encode.tokenizer.decode(found["input_ids"][0])


def test_a_part_that_is_no_text_is_refused_where_texts_are_written() -> None:
    image = [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}, CHAT[1]]
    with pytest.raises(AFLoRAError, match=r"it: the chat template writes texts alone, and a turn has the part .*image"):
        encoder("bytes", None)({"messages": [image]})
    assert encoder("bytes", TAKES_PARTS)({"messages": [image]})["count"][0] > 0


def test_a_chat_that_the_assistant_begins_is_learned_from_its_first_word() -> None:
    for name in ("unmarked", "marked", "plain"):
        encode = encoder("bytes", TEMPLATES[name][0])
        found = encode({"messages": [CHAT[1:4]]})
        said = encode.tokenizer.decode([label for label in found["labels"][0] if label != IGNORED])
        assert said.startswith("yes<")
    with pytest.raises(AFLoRAError, match=r"it: an example asks nothing that could be answered"):
        encode({"messages": [CHAT[1:2]], "answer": [3]})
    for without in (None, ""):
        assert (
            encode({"messages": [CHAT[1:2]], "answer": [without]})["labels"]
            == encode({"messages": [CHAT[1:2]]})["labels"]
        )
    refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('Users begin.') }}{% endif %}"
    with pytest.raises(AFLoRAError, match=r"it: the chat template refuses an example \(Users begin\.\): .*yes"):
        encoder("bytes", refusing)({"messages": [CHAT[1:4]]})


def test_what_is_worth_saying_is_noted() -> None:
    blank = encoder("bytes", TEMPLATES["unmarked, a blank at the end of the prompt"][0])
    assert blank({"messages": [CHAT[:2]]})["notes"] == [Note.JOINED]
    assert blank({"messages": [[CHAT[0], {**CHAT[1], "content": "</s>"}]]})["notes"] == [Note.WRITTEN]
    thinks = {**CHAT[1], "reasoning_content": "5 "}
    calls = {**CHAT[1], "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    tools = [{"type": "function", "function": {"name": "add"}}]
    for turn, known in ((thinks, None), (calls, None), (CHAT[1], tools)):
        assert encoder("bytes", None)({"messages": [[CHAT[0], turn]], "tools": [known]})["notes"] == [Note.LEFT_OUT]
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}"
    chat = [{"role": "system", "content": "well"}, *CHAT[:2]]
    assert encoder("bytes", silent)({"messages": [chat]})["notes"] == [Note.LEFT_OUT]
    text = encoder("RoBERTa", None)
    assert text({"text": ["<s>yes", "yes</s>", "yes"]})["notes"] == [Note.TWICE, Note.TWICE, 0]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("plain", "</s>"),
        ("marked", "<|im_end|>"),
        ("unmarked", "<|im_end|>"),
        ("unmarked, a blank at the end of the prompt", "</s>"),
        ("marked, in words", None),
    ],
)
def test_the_end_of_a_turn_is_the_template_s(template: str, end: str | None) -> None:
    encode = encoder("bytes", TEMPLATES[template][0])
    found = encode.end_of_turn()
    if end is None:
        assert (found.token, found.text) == (None, "USER:")
    else:
        assert encode.tokenizer.convert_ids_to_tokens(found.token) == end
