# SPDX-License-Identifier: Apache-2.0
"""A report in a real browser, light and dark, on a screen and on a phone: nothing overflows, complains, or is asked for."""
from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from qgnn_dist.report.api import make_report
from tests.browser import Browser, find_browser
from tests.helpers import make_store, settings, small_graph
from tests.pages import train_here

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; Debian's package is chromium")
OVERFLOW = """(() => { for (const one of document.querySelectorAll('details')) one.open = true;
  const cut = [...document.querySelectorAll('.card svg, .card .bar, .card figcaption, h1, h2, .value')].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5 || one.scrollWidth > one.clientWidth + 1 &&
      one instanceof HTMLElement && getComputedStyle(one).overflow !== 'visible'); });
  return [document.scrollingElement.scrollWidth <= innerWidth, cut.map((one) => one.outerHTML.slice(0, 80))]; })()"""
EMPTY = """[...document.querySelectorAll('svg.plot, svg.small')].filter((one) =>
  one.getBoundingClientRect().height < 40 || !one.querySelector('.line, .hot, .cold, .bar')).map((one) =>
  one.getAttribute('aria-label'))"""
POINTED = """(() => { const svg = document.querySelector('svg[data-chart^=loss]'); svg.scrollIntoView({block: 'center'});
  const box = svg.getBoundingClientRect(); svg.dispatchEvent(new PointerEvent('pointermove', {bubbles: true,
    clientX: box.left + 0.6 * box.width, clientY: box.top + 0.5 * box.height}));
  return document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent; })()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one run with its store, and of two with long names, one of which is not finished."""
    folder = tmp_path_factory.mktemp("browser")
    store = make_store(small_graph(), folder / "s", 2)
    first, second = folder / "run", folder / ("a-name-that-goes-on-" * 6)
    train_here(store, settings("model.feature_norm=l2", "propagation.alpha=0.001", "train.epochs=3"), first)
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("summary.json", "final.json", "trace.json"))
    make_report([first], out=folder / "one.html", stores=[store.path])
    make_report([first, second], out=folder / "two.html")
    return [folder / "one.html", folder / "two.html"]


def test_pages_in_a_browser(pages: list[Path]) -> None:
    asyncio.run(_look(pages))


async def _look(pages: list[Path]) -> None:
    second = (pages[0].parent / "run" / "metrics.jsonl").read_text().splitlines()[1]
    loss = float(format(json.loads(second)["loss"], ".5g"))
    async with Browser(str(PROGRAM)) as browser:
        for page in pages:
            papers = set()
            for width, dark in ((1400, False), (1400, True), (400, False), (400, True)):
                await browser.open(page, width=width, dark=dark)
                where = f"{page.name}, {width} pixels, dark {dark}"
                assert await browser.ask("innerWidth") == width
                assert await browser.ask(EMPTY) == [], where
                assert await browser.ask(OVERFLOW) == [True, []], where
                told = await browser.ask(POINTED)
                assert told.startswith("epoch 2\n"), f"{where}: {told!r}"
                assert f": {loss}" in told, "the second epoch's loss"
                papers.add(await browser.ask("getComputedStyle(document.body).backgroundColor"))
                assert browser.complaints() == [], where
                assert browser.requests() == [page.as_uri()], where
            assert len(papers) == 2, "light and dark"
