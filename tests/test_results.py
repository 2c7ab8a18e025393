"""README's measured tables are recomputed from the raw rows under results/."""
import re

import pytest
from conftest import ROOT

from analyze_tokens import HEADER, read_rows, table_row

TABLES = re.findall(r"<!-- rows: (\S+) -->\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.S)


def test_readme_has_measured_tables():
    assert len(TABLES) >= 2


@pytest.mark.parametrize("pattern, table", TABLES, ids=[t[0] for t in TABLES])
def test_table_is_what_the_rows_say(pattern, table):
    paths = sorted((ROOT / "results").glob(pattern.removeprefix("results/")))
    assert paths and "\n".join([HEADER, *map(table_row, paths)]) == table


def test_raw_rows_are_whole_runs():
    for path in (ROOT / "results").rglob("*.jsonl"):
        rows = read_rows(path)
        steps = [r["step"] for r in rows if "phase" in r]
        assert steps == list(range(len(steps))), path            # no step is missing or doubled
        assert sum("eval/average" in r for r in rows) >= 2       # before and after
