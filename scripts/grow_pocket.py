"""Make a trained model deeper: `python scripts/grow_pocket.py FROM TO --layers 16 [--tokenizer pocket]`.

New layers are inserted between the old ones. A new layer is a copy of the layer before it, but its two output norms are
zero. So the new model draws exactly the same pictures as the old one, and training changes the new layers from there.
`--tokenizer pocket` replaces the tokenizer by that of this code: the embedding's rows follow their tokens, and new
tokens get new rows.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inkstream.pocket.tokenizer import save_tokenizer

OUTPUT_NORMS = ("attention_norm2.weight", "ffn_norm2.weight")
EMBEDDING = "embed_tokens.weight"


def deepen(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return the weights of a transformer with `layers` layers. The old layers are spread evenly among them."""
    old = 1 + max(int(found[1]) for key in state if (found := re.match(r"layers\.(\d+)\.", key)))
    if layers < old:
        raise SystemExit(f"--layers {layers}: the model already has {old} layers, give a larger number")
    grown = {key: tensor for key, tensor in state.items() if not key.startswith("layers.")}
    before = -1
    for place in range(layers):
        source = place * old // layers
        for key, tensor in state.items():
            if key.startswith(f"layers.{source}."):
                name = key.split(".", 2)[2]
                new = source == before and name in OUTPUT_NORMS
                grown[f"layers.{place}.{name}"] = torch.zeros_like(tensor) if new else tensor.clone()
        before = source
    return grown


def move_embedding(rows: Tensor, old: dict[str, int], new: dict[str, int]) -> Tensor:
    """Reorder embedding rows (V, D) from the old tokenizer's tokens to the new one's. New tokens get random rows."""
    torch.manual_seed(0)
    moved = torch.randn(-(-len(new) // 64) * 64, rows.shape[1]) * rows.float().std()
    for token, number in new.items():
        if token in old:
            moved[number] = rows[old[token]].float()
    return moved.to(rows.dtype)


def tokens(folder: Path) -> dict[str, int]:
    """Read token -> id from a folder's tokenizer.json."""
    table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return table["model"]["vocab"] | {token["content"]: token["id"] for token in table["added_tokens"]}


def change(folder: Path, name: str, **sizes: int) -> None:
    """Set sizes in the config.json of a part."""
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | sizes, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layers", type=int, help="new number of transformer layers; default: no change")
    parser.add_argument("--tokenizer", choices=("pocket",), help="use the tokenizer of this code")
    given = parser.parse_args()
    if given.target.exists():
        raise SystemExit(f"{given.target} already exists: give another folder")
    (weights,) = (given.source / "transformer").glob("*.safetensors")
    deeper = deepen(load_file(weights), given.layers) if given.layers else None  # refused before anything is written
    shutil.copytree(given.source, given.target)
    if deeper is not None:
        save_file(deeper, given.target / "transformer" / weights.name, {"format": "pt"})
        change(given.target, "transformer", n_layers=given.layers)
    if given.tokenizer:
        (file,) = (given.target / "text_encoder").glob("*.safetensors")
        old = tokens(given.target / "tokenizer")
        save_tokenizer(given.target / "tokenizer")
        state = load_file(file)
        state[EMBEDDING] = move_embedding(state[EMBEDDING], old, tokens(given.target / "tokenizer"))
        save_file(state, file, {"format": "pt"})
        change(given.target, "text_encoder", vocab_size=len(state[EMBEDDING]))
    print(given.target)


if __name__ == "__main__":
    main()
