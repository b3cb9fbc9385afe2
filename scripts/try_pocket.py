"""Train Pocket for equal CPU time with one change, grade it, and write a record: a trial.

    python scripts/try_pocket.py                       # list the trials
    python scripts/try_pocket.py adamw                 # 25 CPU-minutes of training, then the grades
    python scripts/try_pocket.py mine --set optimiser.lr=3e-3

A trial follows recipes/pocket/grown.toml with the changes of TRIALS and of --set. Trials whose names begin with `new`
start a new transformer and text encoder: compare them with the trial `new`. All others continue the weights of the
package: compare them with the trial `grown`. The learning rate stays constant, and the averaged weights are graded.
CPU time counts from the end of the first step to the last, without the scenes, which trials share through the cache,
and without the grading. The run is in runs/trials/NAME, the record is benchmarks/records/trial-NAME-cpu.json. Run the
compared trial twice, also with --set run.seed=1, to see how much the seed changes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import inkstream
from inkstream.bench.records import RECORDS, write_record
from inkstream.evaluate.judge import grade_drawings
from inkstream.evaluate.suites import open_suite, thin
from inkstream.train.loop import Progress, export_last, train
from inkstream.train.reading import read_recipe
from inkstream.train.speed import cpu_seconds
from inkstream.types import InputError

RECIPE = Path(__file__).parent.parent / "recipes" / "pocket" / "grown.toml"
WEIGHTS = Path(inkstream.__file__).parent / "pocket" / "weights"
ENDLESS = 10**6
GROWN = ('model.from="pocket"',)
ENCODER = "hidden_size=192, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=3, "
ENCODER += "head_dim=64, intermediate_size=512"


def new(dim: int = 192, layers: int = 8) -> tuple[str, ...]:
    """Return the changes for a new model: a transformer of `layers` layers of width `dim`, Pocket's autoencoder."""
    sizes = f"dim={dim}, n_layers={layers}, n_refiner_layers=1, n_heads={dim // 64}, axes_dims=[16, 24, 24]"
    return (
        'model.from=""', f"model.transformer={{{sizes}}}", f"model.text_encoder={{{ENCODER}}}",
        f'model.vae={{from="{WEIGHTS / "vae"}"}}',
    )  # fmt: skip


TRIALS: dict[str, tuple[str, ...]] = {
    "grown": GROWN,
    "adamw": (*GROWN, 'optimiser.kind="adamw"'),
    "batch-32": (*GROWN, "run.batch=32"),
    "batch-128": (*GROWN, "run.batch=128"),
    "image-loss": (*GROWN, 'objective.weight="image"'),
    "fewer-noisy-times": (*GROWN, "objective.high=0.1"),
    "dense-captions": (*GROWN, "data.wording={dense=1.0, partial=0.0, short=0.0, tags=0.0, english=0.72, plain=0.6}"),
    "bare-captions": (*GROWN, "data.wording={dense=0.3, partial=0.3, short=0.35, tags=0.05, english=0.72, plain=0.6}"),
    "ema-0.99": (*GROWN, "optimiser.ema=0.99"),
    "ema-0.9995": (*GROWN, "optimiser.ema=0.9995"),
    "new": new(),
    "new-wide": new(dim=256),
    "new-narrow": new(dim=128),
    "new-deep": new(layers=16),
}
"""Name of a trial -> its changes to the recipe, in the form of `inkstream train --set`."""


def after(seconds: float) -> Callable[[], bool]:
    """Return a function that is false until `seconds` of CPU time have passed since its first call."""
    started: list[float] = []

    def over() -> bool:
        started.append(cpu_seconds())
        return started[-1] - started[0] > seconds

    return over


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="?", help="a trial of TRIALS, or a name of your own with --set")
    parser.add_argument("--minutes", type=float, default=25, help="CPU time of the training; default: 25")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], help="KEY=VALUE, as inkstream train --set"
    )
    parser.add_argument("--prompts", type=int, default=60, help="graded prompts of suite people; default: 60")
    parser.add_argument("--folder", type=Path, default=Path("runs/trials"), help="default: runs/trials")
    parser.add_argument("--records", type=Path, default=RECORDS, help=f"folder of the record; default: {RECORDS}")
    options = parser.parse_args()
    if options.name is None:
        print("\n".join(f"{name:<20}{'  '.join(changes)}" for name, changes in TRIALS.items()))
        return
    if options.name not in TRIALS and not options.changes:
        sys.exit(f"try_pocket: no trial {options.name!r}: take {', '.join(TRIALS)}, or give --set")
    folder = options.folder / options.name
    if folder.exists():
        sys.exit(f"try_pocket: {folder} holds a trial already: remove it, or give another --folder")
    changes = [*TRIALS.get(options.name, GROWN), *options.changes]
    try:
        recipe = read_recipe(RECIPE, changes)
        recipe = replace(
            recipe, optimiser=replace(recipe.optimiser, decay=0.0),
            run=replace(recipe.run, steps=ENDLESS, graded=0, preview=0, held_out=0, save=ENDLESS),
        )  # fmt: skip
        last: Progress | None = None
        for message in train(recipe, folder, stop=after(60 * options.minutes)):
            if isinstance(message, Progress):
                last = message
                print(f"step {last.step}: loss {last.loss:.4f}, {last.images_per_second:.1f} images/s", flush=True)
        step, model = export_last(recipe, folder)
        graded = grade_drawings(inkstream.load(str(model)), thin(open_suite("people"), options.prompts))
    except InputError as error:
        sys.exit(f"try_pocket: {error}")
    assert last is not None
    row = {
        "trial": options.name, "changes": options.changes, "minutes": options.minutes, "steps": step, "samples":
        step * recipe.run.batch, **{name: round(value, 4) for name, value in asdict(last).items()
                                    if name in ("loss", "images_per_second", "gflops", "peak")},
        "prompts": options.prompts, **{f"share: {name}": round(value, 4) for name, value in graded.items()},
    }  # fmt: skip
    command = shlex.join(["python", "scripts/try_pocket.py", *sys.argv[1:]])
    print(write_record(f"trial-{options.name}-cpu", date.today().isoformat(), command, {}, [row], options.records))
    for name, share in graded.items():
        print(f"{name:<20}{share:.0%}")


if __name__ == "__main__":
    main()
