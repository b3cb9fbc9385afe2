"""Signs that a distillation goes wrong, each with what to change. Source: reports of who reproduced Decoupled-DMD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """A failure sign in the notes of `Distillation.notes`."""

    name: str  # the note
    bad: Callable[[float], bool]
    text: str  # {value} is the note's


SIGNS = (
    Sign(
        "lag", lambda x: x > 0.5,
        "the critic is far from the teacher ({value:.2f} of its estimates): raise [distil] critic_turns or [critic] "
        "lr, or lower [optimiser] lr",
    ),
    Sign(
        "ratio", lambda x: x < 0.02,
        "distribution matching is {value:.1%} of CFG augmentation, so nothing holds the student back: raise [distil] "
        "dm, or set moments = 0.02",
    ),
    Sign(
        "spread", lambda x: x > 1.2,
        "the student's pictures have {value:.2f} times the contrast of the training pictures: take the step with the "
        "best grades, lower [distil] guidance, or raise critic_turns",
    ),
    Sign(
        "spread", lambda x: x < 0.8,
        "the student's pictures have {value:.2f} times the contrast of the training pictures, so they are blurred or "
        "alike: lower [optimiser] lr, or raise [distil] ca",
    ),
    Sign(
        "drift", lambda x: x > 0.2,
        "the student's colours drift ({value:.2f} deviations of the training pictures), as in pictures that get dark "
        "or yellow: lower [optimiser] lr, or set [distil] moments = 0.02",
    ),
    Sign(
        "extremes", lambda x: x > 0.01,
        "{value:.1%} of the student's latents are beyond all of the training pictures: lower [distil] guidance",
    ),
)  # fmt: skip


def signs_in(notes: Mapping[str, float]) -> dict[str, str]:
    """Return the warnings that notes call for, by the text of their signs."""
    return {
        sign.text: sign.text.format(value=notes[sign.name])
        for sign in SIGNS
        if sign.name in notes and sign.bad(notes[sign.name])
    }
