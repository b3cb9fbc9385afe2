"""Draw the atlas of glyphs and emoji that scenes are made of, from fonts. Only training ever needs to do this anew.

    python scripts/build_atlas.py [FOLDER] [--fonts FOLDER]

docs/pocket.md names the fonts, the Debian packages that bring them and their licences.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from inkstream.pocket.atlas import build_atlas
from inkstream.types import InputError

OURS = Path(__file__).parent.parent / "src" / "inkstream" / "pocket" / "atlas"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=OURS, help="where to write; else into the package")
    parser.add_argument("--fonts", type=Path, help="a folder that holds the font files; else where Debian puts them")
    options = parser.parse_args()
    try:
        build_atlas(options.folder, options.fonts)
    except InputError as error:
        sys.exit(f"build_atlas: {error}")
    print(options.folder)


if __name__ == "__main__":
    main()
