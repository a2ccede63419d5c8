# SPDX-License-Identifier: Apache-2.0
"""The pieces that a report's page is made of; page.html draws each by its `kind`."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup

__all__ = ["Bar", "BarRow", "Bars", "Block", "Card", "Group", "Lanes", "Piece", "Plot", "Section", "Smalls", "Table",
           "Words"]


@dataclass(frozen=True)
class Card:
    """A headline figure: what it is, the figure, what to know of it."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Plot:
    """A chart. Attributes: legend: name, colour and dash. span: columns of the page that it takes."""

    title: str
    svg: Markup
    note: str = ""
    legend: Sequence[tuple[str, int, int]] = ()
    span: int = 1
    kind: ClassVar[str] = "plot"


@dataclass(frozen=True)
class Smalls:
    """Small pictures beside each other: title, picture and note of each."""

    title: str
    plots: Sequence[tuple[str, Markup, str]]
    kind: ClassVar[str] = "smalls"


@dataclass(frozen=True)
class Bar:
    """Pieces of a bar, each a share of the whole width, with the number of its colour; and what it says at its end."""

    pieces: Sequence[tuple[float, int]]
    text: str


@dataclass(frozen=True)
class BarRow:
    """What is measured, a bar a run or a kind, and a note, say how many nodes."""

    label: str
    bars: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Rows of bars. Attributes: folded: rows that are shown when asked for. span: columns of the page."""

    title: str
    rows: Sequence[BarRow]
    note: str = ""
    legend: Sequence[tuple[str, int, int]] = ()
    folded: Sequence[BarRow] = ()
    span: int = 1
    kind: ClassVar[str] = "bars"


@dataclass(frozen=True)
class Table:
    """Rows of words. Attributes: folded: shown when asked for. left: columns of words; the first one is, too. span:
    columns of the page, 4 is all."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False
    left: Sequence[int] = ()
    span: int = 2
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Lanes:
    """A timeline: label and picture of each lane, ticks at their share of the width."""

    title: str
    lanes: Sequence[tuple[str, Markup]]
    ticks: Sequence[tuple[float, str]]
    note: str = ""
    legend: Sequence[tuple[str, int, int]] = ()
    kind: ClassVar[str] = "lanes"


@dataclass(frozen=True)
class Words:
    """What is not there, why, and the command that makes it."""

    text: str
    command: str = ""
    kind: ClassVar[str] = "words"


Piece = Plot | Smalls | Bars | Table | Lanes | Words


@dataclass(frozen=True)
class Group:
    """Blocks of one run, where there are several: its name, and its colour."""

    title: str
    colour: int
    blocks: Sequence[Piece]
    kind: ClassVar[str] = "group"


Block = Piece | Group


@dataclass
class Section:
    """A part of the page. Attributes: folded: closed until it is asked for."""

    id: str
    title: str
    lead: str
    blocks: list[Block] = field(default_factory=list)
    folded: bool = False
