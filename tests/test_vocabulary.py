"""Tokenizers that weight files carry, and where a text encoder's tokenizer is looked for."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer

from conftest import MISTRALS, QWENS, write_tokenizer
from inkstream.engine.files.sources import locate
from inkstream.engine.files.tokenizers import open_tokenizer
from inkstream.families.flux1.text import load_t5_tokenizer
from inkstream.families.flux2.family import read_tokenizer
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.parts import load_tokenizer
from inkstream.types import InputError
from inkstream.weights.files import read_state
from inkstream.weights.gguf import write_gguf
from inkstream.weights.vocabulary import holds_vocabulary, read_vocabulary

gguf = pytest.importorskip("gguf")

TEXTS = [
    "a red fox",
    "don't STOP 2025/\n\n now",
    "  Straße 红色的圆  ",
    "x[INST]y",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]
WORDS = [b"re", b"ed", b" r", b" red", b"fo", b"fox", b" fox", b"an", b"\xe7\xba", b"\xe7\xba\xa2", b"//", b"SS"]


def tekken(specials: int = 20, words: list[bytes] = WORDS) -> dict[str, Any]:
    """A tekken.json, with the fields of Mistral Small 3.2's."""
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<x{i}>" for i in range(6)), "<pad>",
             *(f"<y{i}>" for i in range(5)), "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]  # fmt: skip
    vocabulary = [bytes([i]) for i in range(256)] + words
    return {
        "config": {
            "pattern": "unused", "num_vocab_tokens": len(vocabulary),
            "default_vocab_size": specials + len(vocabulary) - 1,
            "default_num_special_tokens": specials, "version": "v13",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for i, word in enumerate(vocabulary)
        ],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)],
    }  # fmt: skip


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def save_tekken(path: Path, data: dict[str, Any] | None = None, prefix: str = "") -> Path:
    content = json.dumps(data or tekken()).encode()
    save_file({"x": torch.ones(2), f"{prefix}tekken_model": as_tensor(content)}, path)
    return path


# What files carry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "text_encoders."])
def test_mistrals_tokenizer_comes_from_its_file(tmp_path, prefix):
    path = save_tekken(tmp_path / "mistral_3_small_flux2_bf16.safetensors", prefix=prefix)
    assert holds_vocabulary(path)
    tokenizer = open_tokenizer(read_tokenizer, path)
    assert [tokenizer.token_to_id(name) for name in ("<unk>", "<pad>", "[SYSTEM_PROMPT]", "<SPECIAL_19>")] == [
        0,
        11,
        17,
        19,
    ]
    assert tokenizer.get_vocab_size() == 20 + 256 + len(WORDS) - 1  # the last word is above the published size
    ids = tokenizer.encode("<s>[INST]a red fox[/INST]", add_special_tokens=False).ids
    words = 20 + 256
    assert ids == [1, 3, 20 + ord("a"), words + 3, words + 6, 4]


def test_it_gives_the_ids_that_transformers_gives(tmp_path):
    converter = pytest.importorskip("transformers.integrations.mistral.tokenizer").MistralConverter
    data = tekken()
    data["config"]["pattern"] = read_pieces()
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    theirs = converter(str(tmp_path / "tekken.json")).converted()
    ours = Tokenizer.from_str(read_vocabulary(save_tekken(tmp_path / "x.safetensors"))["tokenizer.json"].decode())
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids, text


def read_pieces() -> str:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return GGUF_PRE_TOKENIZER_SPLITS["tekken"]


def write_with_words(path: Path, kind: str, **lists: Any) -> Path:
    """A GGUF file by gguf's own writer, with a vocabulary and one tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    for name, value in lists.items():
        if name == "pre":
            writer.add_tokenizer_pre(value)
        else:
            writer.add_array(f"tokenizer.ggml.{name}", value)
    writer.add_tensor("a", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def words_of(tokenizer: Tokenizer) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


@pytest.mark.parametrize("pre", ["qwen2", "tekken"])
def test_ggufs_own_vocabulary_is_read(tmp_path, pre):
    if pre == "tekken":
        original = Tokenizer.from_str(
            read_vocabulary(save_tekken(tmp_path / "x.safetensors"))["tokenizer.json"].decode()
        )
        control, added = {*json.loads(original.to_str())["model"]["vocab"]} & {*MISTRALS, "<unk>"}, set()
    else:
        write_tokenizer(tmp_path / "qwen")
        original = load_tokenizer(tmp_path / "qwen")
        control, added = {*QWENS[:3]}, {*QWENS[3:]}
    words = [*words_of(original), "[PAD1]"]
    kinds = [3 if w in control else 4 if w in added else 5 if w == "[PAD1]" else 1 for w in words]
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    lists = {"tokens": words, "token_type": kinds, **({"merges": merges} if merges else {})}
    path = write_with_words(tmp_path / "x.gguf", "gpt2", pre=pre, **lists)
    read = Tokenizer.from_str(read_vocabulary(path)["tokenizer.json"].decode())
    assert read.token_to_id("[PAD1]") is None
    for text in (*TEXTS, "<think>\n\n</think>\n\n"):
        assert read.encode(text, add_special_tokens=False).ids == original.encode(text, add_special_tokens=False).ids


PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("▁red", -1.5), ("▁fo", -3.0)]
PIECES += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]


def test_sentencepieces_model_and_ggufs_t5_are_t5s_tokenizer(tmp_path):
    import transformers

    theirs = transformers.T5Tokenizer(vocab=[*PIECES, *((f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1))])

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    model = b"".join(
        field(1, field(1, word.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + bytes([3 << 3, 1]))
        for word, score in PIECES
    )
    save_file({"spiece_model": as_tensor(model + field(2, bytes([3 << 3, 1])))}, tmp_path / "t5.safetensors")
    words, scores = map(list, zip(*PIECES))
    write_with_words(tmp_path / "t5.gguf", "t5", tokens=words, scores=scores, token_type=[1] * len(words))
    for name in ("t5.safetensors", "t5.gguf"):
        ours = open_tokenizer(load_t5_tokenizer, tmp_path / name)
        assert len(ours) == len(theirs) == len(PIECES) + 100
        for text in ("a red fox", " a  red\nzz </s>", "", "<extra_id_7> a", "é"):
            options = {"padding": "max_length", "max_length": 12, "truncation": True}
            assert ours(text, **options).input_ids == theirs(text, **options).input_ids, text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("vocab"), "cannot be read"),
        (lambda d: d["config"].update(default_vocab_size=1 << 40), "a vocabulary of"),
        (lambda d: d["special_tokens"][0].update(rank=99), "a special token has a rank among the words"),
        (lambda d: d["vocab"][3].update(token_bytes="!"), "cannot be read"),
        (lambda d: d["vocab"][3].update(token_bytes="AAAA" * 400), "a word of more than 1024 bytes"),
    ],
)
def test_a_damaged_tokenizer_is_named(tmp_path, change, said):
    data = tekken()
    change(data)
    path = save_tekken(tmp_path / "x.safetensors", data)
    with pytest.raises(InputError, match=said) as caught:
        read_vocabulary(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(content=st.binary(max_size=80))
def test_no_bytes_raise_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    for name in ("tekken_model", "spiece_model"):
        save_file({name: as_tensor(content)}, path)
        with pytest.raises(InputError):
            read_vocabulary(path)


def test_other_kinds_of_vocabularies_are_refused_by_name(tmp_path):
    for kind, pre in (("llama", "default"), ("gpt2", "llama-bpe"), ("bert", "jina")):
        path = write_with_words(tmp_path / f"{kind}.gguf", kind, pre=pre, tokens=["a", "b"])
        with pytest.raises(InputError, match=f"a tokenizer of the kind {kind}, {pre}, which is not read"):
            read_vocabulary(path)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert not holds_vocabulary(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="carries no tokenizer"):
        read_vocabulary(tmp_path / "x.safetensors")


# Where a tokenizer is -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(make_folder, tmp_path, monkeypatch) -> Path:
    """A tiny FLUX.2 klein in a ComfyUI installation, without a tokenizer; the hub's cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    made = make_folder(tmp_path / "ComfyUI/models/diffusion_models/flux2-klein-4b", KLEIN_4B.tiny)
    shutil.rmtree(made / "tokenizer")
    return made


def test_places_are_looked_at_in_order(model):
    installed = model.parents[2] / "comfy/text_encoders/qwen25_tokenizer"
    with pytest.raises(InputError, match=rf"has no tokenizer: put one into {model}/tokenizer/, or .* `hf download"):
        locate(model)
    write_tokenizer(installed)
    assert locate(model).tokenizers["tokenizer"] == installed
    words = [*words_of(Tokenizer.from_file(str(installed / "tokenizer.json")))]
    kinds = [3 if word in QWENS else 1 for word in words]
    state = read_state(model / "text_encoder")
    (weights,) = (model / "text_encoder").glob("*.safetensors")
    weights.unlink()
    file = model / "text_encoder" / "qwen.gguf"
    write_gguf(file, state, state.items(), {"general.architecture": "qwen3"})
    add_words(file, words, kinds)
    assert locate(model).tokenizers["tokenizer"] == model / "text_encoder"
    assert open_tokenizer(read_tokenizer, model / "text_encoder").token_to_id("<think>") == 259
    write_tokenizer(model / "tokenizer")
    assert locate(model).tokenizers["tokenizer"] == model / "tokenizer"


def add_words(path: Path, words: list[str], kinds: list[int]) -> None:
    """Writes a GGUF file again, with a vocabulary."""
    reader = gguf.GGUFReader(path)
    tensors = [(tensor.name, tensor.data.copy()) for tensor in reader.tensors]
    del reader
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    for name, data in tensors:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("missing", ["<think>", "</think>", "<|endoftext|>"])
def test_a_tokenizer_without_the_tokens_of_kleins_template_is_refused_by_name(tmp_path, missing):
    write_tokenizer(tmp_path, [token for token in QWENS if token != missing])
    with pytest.raises(
        InputError, match=rf"has no {missing.replace('|', '.')}, which every prompt of FLUX\.2 klein holds"
    ):
        read_tokenizer(tmp_path)
