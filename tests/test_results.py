"""README's measured tables are recomputed from the raw rows under results/."""
import re

import pytest
import study
from conftest import ROOT

from analyze_tokens import read_rows

TABLES = [found for page in study.PAGES for found in study.MARKED.findall(page.read_text())]


def test_every_table_stands_on_a_page():
    assert {name for name, _ in TABLES} == study.TABLES.keys()


@pytest.mark.parametrize("name, table", TABLES, ids=[t[0] for t in TABLES])
def test_table_is_what_the_rows_say(name, table):
    assert study.TABLES[name]() == table


def test_raw_rows_are_whole_runs():
    """No step is missing, every run was evaluated before and after, and every recipe has seeds 0, 1, ..."""
    seeds = {}
    for path in sorted((ROOT / "results/study").glob("*.csv")):
        rows = read_rows(path)
        assert [r["step"] for r in rows] == list(range(len(rows))), path
        assert all("phase" in r for r in rows[:-1]) and "eval/average" in rows[0] and "eval/average" in rows[-1], path
        name, seed = re.fullmatch(r"(.+)-seed(\d+)", path.stem).groups()
        seeds.setdefault(name, []).append(int(seed))
    assert seeds and all(found == list(range(len(found))) for found in seeds.values()), seeds
    assert seeds.keys() <= study.RECIPES.keys()


def test_recipes_are_command_lines_that_train_accepts():
    import train
    for name, (flags, seeds) in study.RECIPES.items():
        train.parse_args([*study.COMMON.split(), *flags.split()])
        assert seeds >= 3, name
