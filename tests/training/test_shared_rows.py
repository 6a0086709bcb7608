"""Hosts whose devices share every row read the same rows, and train as one host does."""

from __future__ import annotations

import pytest
from running import metrics, on_hosts


@pytest.mark.long
def test_rows_on_the_devices_of_two_hosts(tmp_path):
    on_hosts("shared_rows.py", tmp_path / "one", 1)
    on_hosts("shared_rows.py", tmp_path / "two", 2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert one.keys() == two.keys()
    for step, row in one.items():
        assert two[step]["loss"] == pytest.approx(row["loss"], rel=2e-5)
        assert two[step]["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=2e-5)
