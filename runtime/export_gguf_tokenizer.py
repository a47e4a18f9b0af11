"""A tokenizer as GGUF describes one: tokens, their kinds, merges, and the name of what llama.cpp splits texts with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gguf

from ..predictors.errors import CoreskipError

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: how texts are split before they are merged, and what llama.cpp calls that
_SPLITS: dict[str, tuple[dict[str, Any], ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (_DIGITS, _GPT2),
    "llama-bpe": ({"type": "Split", "regex": _CONTRACTIONS + r"\p{N}{1,3}" + _REST}, _BYTES),
    "qwen2": ({"type": "Split", "regex": _CONTRACTIONS + r"\p{N}" + _REST}, _BYTES),
}
_SPACE = "\u2581"  # stands for a space in SentencePiece's vocabularies


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer.

    Attributes:
        model: "gpt2": merges of bytes by their rank; "llama": of pieces by their score.
        split: llama.cpp's name of how texts are split first.
        scores: of pieces; empty for "gpt2".
    """

    model: str
    split: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    begins: bool
    prefixed: bool
    template: str | None

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> Vocabulary:
        """size: rows of the embedding.

        Raises:
            CoreskipError: the tokenizer has no form in GGUF.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _refusal(f"a {type(tokenizer).__name__} is not one of the tokenizers package")
        described = json.loads(backend.to_str())
        inner = described["model"]
        if inner.get("type") != "BPE":
            raise _refusal(f"its model is {inner.get('type')}, not BPE")
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in inner["merges"]]
        by_score = bool(inner.get("byte_fallback"))
        tokens, kinds = _tokens(tokenizer, inner, described["added_tokens"], size)
        split = "default" if by_score else _split(described, inner)
        special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
        probe = tokenizer("a").input_ids
        return cls(
            model="llama" if by_score else "gpt2",
            split=split,
            tokens=tokens,
            kinds=kinds,
            merges=[] if by_score else pairs,
            scores=_scores(described, pairs, tokens) if by_score else [],
            special={name: int(found) for name, found in special.items() if found is not None},
            begins=bool(probe) and tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id,
            prefixed=by_score and "Prepend" in json.dumps(described["normalizer"]),
            template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        )

    def write(self, writer: Any) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prefixed)
        else:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.begins)
        if self.template:
            writer.add_chat_template(self.template)


def _refusal(why: str) -> CoreskipError:
    return CoreskipError(f"the tokenizer has no form in GGUF: {why}")


def _tokens(
    tokenizer: Any, inner: dict[str, Any], added: list[dict[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    """Every row's token and its kind; rows without one get a name."""
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(names) >= size:
        raise _refusal(f"token {max(names)} has no row among the model's {size} embeddings")
    kind = gguf.TokenType
    kinds = dict.fromkeys(names, kind.NORMAL)
    if inner.get("byte_fallback"):
        kinds |= {i: kind.BYTE for i, token in names.items() if len(token) == 6 and token.startswith("<0x")}
    kinds |= {entry["id"]: kind.CONTROL if entry["special"] else kind.USER_DEFINED for entry in added}
    if tokenizer.unk_token_id is not None and inner.get("byte_fallback"):
        kinds[tokenizer.unk_token_id] = kind.UNKNOWN
    rows = range(size)
    return [names.get(i, f"[PAD{i}]") for i in rows], [int(kinds.get(i, kind.UNUSED)) for i in rows]


def _split(described: dict[str, Any], inner: dict[str, Any]) -> str:
    before = described["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    found = tuple(_plain(step) for step in steps)
    name = next((name for name, wanted in _SPLITS.items() if wanted == found), None)
    if name is None:
        raise _refusal("texts are split by rules that are none of " + ", ".join(_SPLITS))
    if bool(inner.get("ignore_merges")) != (name == "llama-bpe"):
        raise _refusal("whole words count before merges, or do not, otherwise than llama.cpp has it")
    if (described["normalizer"] or {"type": "NFC"}).get("type") != "NFC":  # which llama.cpp leaves to whoever writes
        raise _refusal("texts are changed before they are split")
    return name


def _plain(step: dict[str, Any]) -> dict[str, Any]:
    """A step of splitting without what makes no difference to the tokens."""
    if step.get("type") == "Split":
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        return {"type": "Split", "regex": step["pattern"].get("Regex") if isolated else None}
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def _scores(described: dict[str, Any], pairs: list[str], tokens: list[str]) -> list[float]:
    """The earlier a piece is merged, the higher its score; what is never merged is never asked for one."""
    if not any(_SPACE in json.dumps(described[step], ensure_ascii=False) for step in ("normalizer", "pre_tokenizer")):
        raise _refusal("spaces do not become pieces of their own")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]
