"""Draw the atlas of glyphs and emoji for Pocket's scenes, and the letters of captions. The package holds both.

    python scripts/build_atlas.py [FOLDER] [--fonts FOLDER]

Only new training data needs a new atlas. docs/pocket.md lists the fonts, their Debian packages and their licences.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from inkstream.pocket.atlas import build_atlas
from inkstream.pocket.letters import build_letters
from inkstream.types import InputError

OURS = Path(__file__).parent.parent / "src" / "inkstream" / "pocket" / "atlas"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=OURS, help="output folder; default: in the package")
    parser.add_argument("--fonts", type=Path, help="folder of the font files; default: Debian's folders")
    options = parser.parse_args()
    try:
        build_atlas(options.folder, options.fonts)
        build_letters(options.folder, options.fonts)
    except InputError as error:
        sys.exit(f"build_atlas: {error}")
    print(options.folder)


if __name__ == "__main__":
    main()
