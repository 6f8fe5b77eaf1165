"""Tokenizers of many kinds, and chat templates beside what they write, for tests of which tokens carry loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The answer is 14. yes, fine! how are you? user assistant system ### Response: ### Instruction: USER: ASSISTANT:",
    "hello  world\n\nthe answer is 6.\n yes é ß 你好 😀 \t end",
    "says that all is well .\n\n",
]


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def _byte_level(trim: bool, prefix: bool = False, split: str | None = None, roberta: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
    parts = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    _trained(tokenizer, trainer)
    ends = (("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>")))
    tokenizer.post_processor = (
        processors.RobertaProcessing(*ends, trim_offsets=trim, add_prefix_space=prefix)
        if roberta
        else processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix)
    )
    return tokenizer


def _sentencepiece(prepend: str | None) -> Tokenizer:
    """As Llama's: `prepend` None: by a normaliser; else by a pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prepend is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=prepend != "never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    return _trained(
        tokenizer, trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=[*SPECIAL, *alphabet])
    )


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=120, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>"),
    )


def _word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=200, show_progress=False, special_tokens=SPECIAL))


_GPT4 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: _byte_level(trim=False),
    "bytes, trimmed": lambda: _byte_level(trim=True),
    "bytes, trimmed, as GPT-4 splits": lambda: _byte_level(trim=True, split=_GPT4),
    "bytes, with a blank before": lambda: _byte_level(trim=True, prefix=True),
    "RoBERTa": lambda: _byte_level(trim=True, roberta=True),
    "Llama": lambda: _sentencepiece(None),
    "Metaspace, first": lambda: _sentencepiece("first"),
    "Metaspace, always": lambda: _sentencepiece("always"),
    "Metaspace, never": lambda: _sentencepiece("never"),
    "Unigram": _unigram,
    "WordPiece": _word_pieces,
}
LOSSLESS = [kind for kind in KINDS if kind not in ("Unigram", "WordPiece")]


@functools.cache
def made(kind: str) -> Tokenizer:
    return KINDS[kind]()


def chat_tokenizer(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made(kind), pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template
    return fast


Piece = tuple[str, bool]  # text, and whether the assistant says it


def _chat_ml(role: str, content: str) -> list[Piece]:
    said = role == "assistant"
    return [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>\n", said)]


def _words(role: str, content: str) -> list[Piece]:
    said = role == "assistant"
    return [("ASSISTANT:" if said else "USER:", False), (f" {content}", said), ("\n", False)]


def _plain(role: str, content: str) -> list[Piece]:
    if role == "assistant":
        return [("### Response:\n", False), (f"{content}</s>", True), ("\n\n", False)]
    return [(content if role == "system" else f"### Instruction:\n{content}", False), ("\n\n", False)]


def _colon(role: str, content: str) -> list[Piece]:
    return [(f"{role}: ", False), (f"{content}</s>", role == "assistant")]


# name -> (the template, what it writes before all, what it writes for a turn)
TEMPLATES: dict[str, tuple[str | None, str, Callable[[str, str], list[Piece]]]] = {
    "plain": (None, "<s>", _plain),
    "marked": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}",
        "",
        _chat_ml,
    ),
    "marked in a macro, with comments and blanks": (
        "{# {% generation %} #}\n"
        "{%- macro say(m) %}{% generation %}{{ m.content }}<|im_end|>{{ '\n' }}{% endgeneration %}{% endmacro %}\n"
        "{%- for m in messages -%}\n"
        "    {{- '<|im_start|>' + m.role + '\n' -}}\n"
        "    {%- if m.role == 'assistant' -%}{{- say(m) -}}\n"
        "    {%- else -%}{{- m.content + '<|im_end|>\n' -}}{%- endif -%}\n"
        "{%- endfor -%}",
        "",
        _chat_ml,
    ),
    "marked, in words": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT:' }}"
        "{%- generation -%}{{ ' ' + m.content }}{%- endgeneration -%}"
        "{% else %}{{ 'USER: ' + m.content }}{% endif %}{{ '\n' }}{% endfor %}",
        "",
        _words,
    ),
    "unmarked": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "",
        _chat_ml,
    ),
    "unmarked, a blank at the end of the prompt": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "",
        _colon,
    ),
}


def written(template: str, chat: list[dict[str, Any]]) -> list[Piece]:
    """What a template writes, piece by piece, and whether that is the assistant's, to be learned."""
    _, start, turn = TEMPLATES[template]
    found = [(start, False)]
    for said in chat:
        learned = said.get("weight") != 0 and bool(said["content"].strip())
        found += [(text, spoken and learned) for text, spoken in turn(said["role"], said["content"])]
    return found
