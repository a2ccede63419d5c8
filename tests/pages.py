# SPDX-License-Identifier: Apache-2.0
"""Runs trained in this process on parts of a small graph, and what stands in a report's page."""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import RunConfig
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from qgnn_dist.store.reader import Store
from qgnn_dist.training.loop import prepare_run, run_training
from qgnn_dist.training.worker import TrainWorker

__all__ = ["Page", "train_here"]


def train_here(store: Store, config: RunConfig, out: Path) -> dict[str, Any]:
    """`qgnn train` with a thread a part, without Ray; the summary."""
    size = store.num_parts
    server = InProcessServer(
        MultiplierServer(size, MultiplierRule.of(config, store.num_edges), config.timeouts.server_s))
    pool = LocalPool(TrainWorker, {"store": str(store.path), "config": config}, size, server=server, timeout_s=60)
    try:
        run, _ = prepare_run(out, store, config, resume=False, overwrite=False)
        return run_training(pool, server.call, store, config, run)
    finally:
        pool.close()
        server.close()


@dataclass
class Element:
    """An HTML or SVG element: its name, attributes and the text right below it."""

    name: str
    attributes: dict[str, str]
    text: str = ""
    inner: list[Element] = field(default_factory=list)

    def all(self, name: str, **attributes: str) -> list[Element]:
        """Elements below with this name and these attributes (class_ is one of several words)."""
        found = []
        for one in self.inner:
            words = one.attributes.get("class", "").split()
            if one.name == name and all(
                    value in words if key == "class_" else one.attributes.get(key.replace("_", "-")) == value
                    for key, value in attributes.items()):
                found.append(one)
            found += one.all(name, **attributes)
        return found

    def words(self) -> str:
        """All text of it and below."""
        return " ".join([self.text, *(one.words() for one in self.inner)]).strip()


class Page(HTMLParser):
    """A report, parsed. Attributes: root: holds all elements. data: the JSON in it."""

    EMPTY = ("meta", "link", "br", "img", "input")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        (script,) = self.root.all("script", type="application/json")
        self.data = json.loads(script.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        one = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].inner.append(one)
        if tag not in self.EMPTY:
            self._open.append(one)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].inner.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].name == tag, f"</{tag}> closes <{self._open[-1].name}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].text += data

    def section(self, name: str) -> Element:
        """The section of this id."""
        return next(one for one in self.root.all("section") if one.attributes.get("id") == name)

    def chart(self, name: str) -> dict[str, Any]:
        """A chart's JSON."""
        return next(dict(one) for one in self.data["charts"] if one["id"] == name)
