"""Tokenizers that weight files carry, as files of a tokenizer's folder: Mistral's tekken, sentencepiece's, GGUF's.

ComfyUI's single files of text encoders hold a tokenizer as a tensor of bytes: `tekken_model` is Mistral's tekken.json,
`spiece_model` is a model of sentencepiece. GGUF files hold the words of a vocabulary among their values.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from inkstream.types import InputError
from inkstream.weights.files import read_header, read_tensors, weight_files
from inkstream.weights.gguf import read_contents

TEKKEN, SPIECE = "tekken_model", "spiece_model"

VALUES = ("tokens", "token_type", "scores", "merges", "precompiled_charsmap")
"""GGUF's lists of a tokenizer, below `tokenizer.ggml.`"""

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Kinds of tokens in GGUF files and in sentencepiece's models; others are ordinary words."""

MOST_WORDS, LONGEST_WORD, MOST_BYTES = 1 << 20, 1 << 10, 1 << 26
"""Limits of a vocabulary that is read. Mistral's has 131,072 words and 15 MB."""

# Contractions; a word and one mark before it; one digit; marks and the line ends after them; line ends; spaces.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
# A word that ends in small letters, or in capitals; both with one mark before; then as above, with slashes after marks.
TEKKEN_PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
PIECES = {"qwen2": QWEN_PIECES, "tekken": TEKKEN_PIECES}
"""GGUF's name of a vocabulary's rule -> how a text is cut into pieces before words are looked up."""


def holds_vocabulary(path: Path) -> bool:
    """Whether a weight file, or a folder of such files, carries a tokenizer. False where it cannot be read."""
    try:
        files, _ = weight_files(path)
        if files[0].suffix == ".gguf":
            return "tokenizer.ggml.tokens" in read_contents(files[0]).values
        return _carried(path) is not None
    except InputError:
        return False


def read_vocabulary(path: Path) -> dict[str, bytes]:
    """The tokenizer that a weight file carries, as files of a tokenizer's folder by name.

    Raises InputError if the file carries none, or one that is damaged or of an unknown kind.
    """
    try:
        file = weight_files(path)[0][0]
        return _from_gguf(file) if file.suffix == ".gguf" else _from_safetensors(path)
    except InputError:
        raise
    except Exception as error:  # the tokenizers package raises bare Exceptions
        raise InputError(f"the tokenizer in {path} cannot be read ({error}): download the file again") from error


def _carried(path: Path) -> str | None:
    names = read_header(path).tensors
    return next((name for name in names if name.rpartition(".")[2] in (TEKKEN, SPIECE)), None)


def _from_safetensors(path: Path) -> dict[str, bytes]:
    name = _carried(path)
    if name is None:
        raise InputError(f"{path} carries no tokenizer: put the model's tokenizer folder beside it")
    tensor = read_tensors(path, {name})[name]
    if tensor.nbytes > MOST_BYTES:
        raise ValueError(f"it has {tensor.nbytes:,} bytes, the limit is {MOST_BYTES:,}")
    data = bytes(tensor.flatten().view(torch.uint8).numpy())
    if name.endswith(TEKKEN):
        return {"tokenizer.json": from_tekken(json.loads(data)).to_str().encode()}
    return _unigram(*_parse_spiece(data))


# Byte-level BPE -----------------------------------------------------------------------------------------------------


def from_tekken(data: Mapping[str, Any]) -> Tokenizer:
    """Mistral's tokenizer from tekken.json. Special tokens have the first ids; a word's id is its rank after them.

    A word is merged from the two words of the lowest ranks; words that cannot be merged are looked up whole.
    """
    config, specials = data["config"], data["special_tokens"]
    count = max(int(config.get("default_num_special_tokens", 0)), len(specials))
    size = int(config["default_vocab_size"])
    if not 0 < size <= MOST_WORDS:
        raise ValueError(f"a vocabulary of {size} words")
    listed = sorted(data["vocab"], key=lambda word: word["rank"])
    words = [base64.b64decode(word["token_bytes"], validate=True) for word in listed]
    if max(map(len, words), default=0) > LONGEST_WORD:
        raise ValueError(f"a word of more than {LONGEST_WORD} bytes")
    ranks = {word: rank for rank, word in enumerate(words[: size - count])}
    names = {int(special["rank"]): str(special["token_str"]) for special in specials}
    if names and not 0 <= min(names) <= max(names) < count:
        raise ValueError("a special token has a rank among the words")
    control = [names.get(i, f"<SPECIAL_{i}>") for i in range(count)]
    letters = _letters()

    def spelt(word: bytes) -> str:
        return "".join(letters[byte] for byte in word)

    merges = [(spelt(left), spelt(right)) for left, right in _merges(ranks)]
    vocabulary = {token: i for i, token in enumerate(control)} | {spelt(w): count + rank for w, rank in ranks.items()}
    return _byte_level(vocabulary, merges, TEKKEN_PIECES, control, (), ignore_merges=True)


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of words whose merges make the words, in the order in which they are merged."""
    for word in ranks:  # in order of their ranks
        halves = [(word[:i], word[i:]) for i in range(1, len(word))]
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    pieces: str,
    special: Sequence[str],
    added: Sequence[str],
    normalize: bool = False,
    ignore_merges: bool = False,
) -> Tokenizer:
    tokenizer: Any = Tokenizer(models.BPE(dict(vocabulary), list(merges), ignore_merges=ignore_merges))
    if normalize:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return tokenizer


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies: printable ones for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# GGUF ---------------------------------------------------------------------------------------------------------------


def _from_gguf(path: Path) -> dict[str, bytes]:
    values = read_contents(path, {f"tokenizer.ggml.{name}" for name in VALUES}).values
    kind, rule = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    words = _listed(values, "tokens", str)
    kinds = _listed(values, "token_type", int) or (1,) * len(words)
    if not 0 < len(words) <= MOST_WORDS or len(kinds) != len(words):
        raise InputError(f"{path} carries a vocabulary of {len(words)} words and {len(kinds)} kinds: download it again")
    if kind == "t5":
        scores = _listed(values, "scores", float)
        charsmap = bytes(n & 255 for n in _listed(values, "precompiled_charsmap", int))
        return _unigram(words, scores, charsmap)
    if kind != "gpt2" or rule not in PIECES:
        raise InputError(
            f"{path} carries a tokenizer of the kind {kind}, {rule}, which is not read: "
            "put the model's tokenizer folder beside it"
        )
    merges = [_pair(merge) for merge in _listed(values, "merges", str)]
    vocabulary = {word: i for i, word in enumerate(words) if kinds[i] != UNUSED}
    special, added = ([w for w, k in zip(words, kinds) if k == wanted] for wanted in (CONTROL, USER_DEFINED))
    tokenizer = _byte_level(
        vocabulary, merges, PIECES[rule], special, added, rule == "qwen2", ignore_merges=rule == "tekken"
    )
    return {"tokenizer.json": tokenizer.to_str().encode()}


def _listed(values: Mapping[str, Any], name: str, kind: type) -> tuple[Any, ...]:
    listed = values.get(f"tokenizer.ggml.{name}", ())
    if not isinstance(listed, tuple) or not all(isinstance(value, kind) for value in listed):
        raise ValueError(f"tokenizer.ggml.{name} is not a list of {kind.__name__}")
    return listed


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        raise ValueError(f"{merge!r} is not a pair of words")
    return left, right


# Sentencepiece ------------------------------------------------------------------------------------------------------


def _unigram(words: Sequence[str], scores: Sequence[float], charsmap: bytes) -> dict[str, bytes]:
    """T5's tokenizer from its words. Its published folder writes out the words of the first 100 ids after them."""
    if len(words) != len(scores) or list(words[:3]) != ["<pad>", "</s>", "<unk>"]:
        raise ValueError(f"the vocabulary is not T5's: it begins with {list(words[:3])}")
    extra = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    plain = [(w, s) for w, s in zip(words, scores) if not w.startswith("<extra_id_")]
    tokenizer: Any = Tokenizer(models.Unigram([*plain, *((word, 0.0) for word in extra)], unk_id=2))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in (*words[:3], *extra)])
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def _parse_spiece(data: bytes) -> tuple[list[str], list[float], bytes]:
    """Words, their scores, and the table of normalisation of a model of sentencepiece, a protobuf message.

    Its field 1 is a word: text 1, score 2. Its field 3 is the normalisation, with the table as field 2.
    """
    words: list[str] = []
    scores: list[float] = []
    charsmap = b""
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            words.append(bytes(fields[1]).decode("utf-8"))
            scores.append(struct.unpack("<f", bytes(fields.get(2, bytes(4))))[0])
        elif number == 3 and isinstance(value, bytes):
            charsmap = bytes(dict(_fields(value)).get(2, b""))
        if len(words) > MOST_WORDS:
            raise ValueError(f"a vocabulary of more than {MOST_WORDS} words")
    return words, scores, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protobuf message: number and value; numbers of fixed width are given as their bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number is too long")

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        sizes = {1: 8, 5: 4}
        if kind not in (1, 2, 5):
            raise ValueError(f"a field has the unknown kind {kind}")
        size = varint() if kind == 2 else sizes[kind]
        if at + size > len(data):
            raise ValueError("a field is cut short")
        yield key >> 3, data[at : at + size]
        at += size
