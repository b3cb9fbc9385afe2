"""Train Pocket on a large GPU in stages of less than nine minutes. Run the commands in this order:

    python scripts/train_pocket.py vae      # 1. the autoencoder
    python scripts/train_pocket.py base     # 2. the transformer and its text encoder at 128 x 128
    python scripts/train_pocket.py large    # 3. the same at 256 x 256
    python scripts/train_pocket.py score    # 4. inkstream eval, with its record and contact sheet

A stage measures its speed for half a minute. Then it sets the number of steps so that its time limit is used and the
learning rate reaches 0 at the end. If the command runs again, the stage resumes from its checkpoint and gets the same
time once more. Recipes are in recipes/pocket/gpu, runs in runs/gpu. To ship the model, copy runs/gpu/large/model to
src/inkstream/pocket/weights. --rehearse runs a stage at a thousandth of its size, on any machine.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from inkstream.cli import main
from inkstream.train.checkpoint import list_checkpoints
from inkstream.train.loop import Finished, HeldOut, Preview, Progress, Saved, train
from inkstream.train.reading import read_recipe
from inkstream.train.recipe import Recipe

RECIPES = Path(__file__).parent.parent / "recipes" / "pocket" / "gpu"
PIECES = ("vae", "base", "large")
MEASURED = 30.0
"""Seconds of training from which the speed is measured."""
LAST = 25.0
"""Seconds reserved for the last evaluation, the checkpoint and the model's folder."""
ENDLESS = 10**7


def run(recipe: Recipe, folder: Path, seconds: float) -> None:
    """Train for `seconds`, including the preparation before the first step. A checkpoint is resumed if there is one."""
    began = time.monotonic()
    open_end = replace(recipe, run=replace(recipe.run, steps=ENDLESS))
    first: Progress | None = None
    started = steps = 0.0
    messages = train(open_end, folder, resume=bool(list_checkpoints(folder / "checkpoints")))
    for message in messages:
        now = time.monotonic()
        if isinstance(message, Progress):
            if first is None:
                first, started = message, now  # compilation is finished
            elif now - started >= min(MEASURED, seconds / 10):
                rate = (message.step - first.step) / (now - started)
                left = seconds - (now - began) - min(LAST, seconds / 10) - (started - began) * 0.25  # a second start
                steps = message.step + max(int(rate * left), 1)
                print(f"{rate:.2f} steps/s, ready after {started - began:.0f} s: {steps:.0f} steps in all", flush=True)
                break
    messages.close()
    whole = replace(recipe, run=replace(recipe.run, steps=int(steps)))
    for message in train(whole, folder, resume=True):
        if isinstance(message, Progress | HeldOut | Preview | Saved | Finished):
            print(message, flush=True)
    print(f"{time.monotonic() - began:.0f} s in all")


def rehearsed(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe at a thousandth of its size: few pictures, few steps, small batches, float32."""
    some = replace(recipe.run, batch=4, log=2, save=10, held_out=10, held_out_count=4, preview=10, preview_count=2,
                   compile=False, dtype="fp32")  # fmt: skip
    data = replace(recipe.data, count=max(recipe.data.count // 1000, 16), workers=1, cache=str(folder / "cache"))
    model = recipe.model
    if model.from_:
        model = replace(model, from_=str(folder / "base" / "model"))
    elif "from" in model.vae:
        model = replace(model, vae={"from": str(folder / "vae" / "model")})
    return replace(recipe, model=model, data=data, run=some)


def score(folder: Path, rehearse: bool) -> int:
    words = ["eval", str(folder / "large" / "model"), "--output", str(folder / "evaluation")]
    return main(words + (["--limit", "4", "--seeds", "1"] if rehearse else []))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=[*PIECES, "score"])
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    place = Path("runs") / ("rehearsal" if given.rehearse else "gpu")
    if given.piece == "score":
        raise SystemExit(score(place, given.rehearse))
    wanted = read_recipe(RECIPES / f"{given.piece}.toml")
    if given.rehearse:
        run(rehearsed(wanted, place), place / given.piece, 40)
    else:
        run(wanted, place / given.piece, given.minutes * 60)
