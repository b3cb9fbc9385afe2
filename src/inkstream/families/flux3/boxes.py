"""Prompts with boxes: a caption that cites each element as <id>, one space, and a JSON list of the elements.

A row of the list has "id", "bbox" and "desc". In an edit it may have "from", "src_bbox" and "tgt_bbox" in place of
"bbox". A box is [top, left, bottom, right] from 0 to 1000. Source: the prompt upsampler in diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from inkstream.types import InputError, as_list, as_object

SIDE = 1000
_LIST = re.compile(r"\s*(\[\s*\{\s*\"id\".*)", re.DOTALL)


def check_boxes(prompt: str, references: int) -> None:
    """Raises InputError if a prompt ends in a list of boxes that the model would not understand."""
    found = _LIST.search(prompt)
    if found is None:
        return
    caption = prompt[: found.start()]
    try:
        rows = as_list(json.loads(found[1]))
    except json.JSONDecodeError as error:
        raise InputError(f"the list of boxes in the prompt is not JSON ({error}): correct it, or end at it") from None
    names = [_check(number, as_object(row) or {}, references) for number, row in enumerate(rows, 1)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{names.count(name)} boxes have the id {name}: give each its own, such as {name}_2")
        if f"<{name}>" not in caption:
            raise InputError(f"the caption before the boxes does not cite <{name}>: write it behind what the box holds")


def _check(number: int, row: dict[str, Any], references: int) -> str:
    """The id of a row."""
    name = row.get("id")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise InputError(f"box {number} has the id {name!r}: take a word with a number, such as cup_1")
    if not isinstance(row.get("desc"), str) or not row["desc"].strip():
        raise InputError(f"box {name} has no desc: describe what it holds")
    keys = ("bbox",) if "bbox" in row else ("src_bbox", "tgt_bbox")
    given = {key: row.get(key) for key in keys if row.get(key) is not None}
    if not given:
        raise InputError(f"box {name} has no bbox, src_bbox or tgt_bbox: give one as [top, left, bottom, right]")
    for key, box in given.items():
        if not _is_box(as_list(box)):
            raise InputError(f"{key} {box} of box {name} is not [top, left, bottom, right] from 0 to {SIDE}")
    if "bbox" not in row:
        pictures = [f"ref_image_{i}" for i in range(references)]
        if row.get("from") not in ("target", *pictures) or (row["from"] == "target") == ("src_bbox" in given):
            known = " or ".join((*pictures, "target without src_bbox"))
            raise InputError(f"box {name} is from {row.get('from')!r}: take {known}")
    return name


def _is_box(box: Sequence[Any]) -> bool:
    if len(box) != 4 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in box):
        return False
    top, left, bottom, right = box
    return 0 <= top < bottom <= SIDE and 0 <= left < right <= SIDE and max(box) > 1
