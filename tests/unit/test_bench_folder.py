# SPDX-License-Identifier: Apache-2.0
"""The folder of a bench of one go: nothing that is not its own earlier table is written over."""
from __future__ import annotations

from pathlib import Path

import pytest

from qgnn_dist.bench.folder import table_folder
from qgnn_dist.errors import InputError


def _with_table(folder: Path, text: str = '{"bench": "order"}') -> Path:
    folder.mkdir()
    (folder / "table.json").write_text(text, encoding="utf-8")
    return folder


def test_a_new_an_empty_and_an_own_folder_are_taken(tmp_path: Path) -> None:
    assert table_folder(tmp_path / "new", "order", overwrite=False) == tmp_path / "new"
    (tmp_path / "new" / "graph.npz").touch()  # what a bench that was stopped has left, as --keep in its own folder
    assert table_folder(tmp_path / "new", "order", overwrite=False) == tmp_path / "new"
    with pytest.raises(InputError, match="belongs to another kind or version of bench"):
        table_folder(tmp_path / "new", "partition", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert table_folder(str(tmp_path / "empty"), "order", overwrite=False) == tmp_path / "empty"
    own = _with_table(tmp_path / "own")
    assert table_folder(own, "order", overwrite=True) == own
    with pytest.raises(InputError, match="own: output exists; add --overwrite to replace it"):
        table_folder(own, "order", overwrite=False)


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_not_its_own_is_refused_even_to_be_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    places = [tmp_path / "file", tmp_path / "other", _with_table(tmp_path / "train", '{"bench": "train"}'),
              _with_table(tmp_path / "list", "[]"), _with_table(tmp_path / "damaged", "{")]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "table.json").mkdir()
    for place in [*places, tmp_path / "deep"]:
        with pytest.raises(InputError, match="output exists and is not the folder of a `qgnn bench order`"):
            table_folder(place, "order", overwrite=overwrite)
