"""The measured tables of the pages are recomputed from the raw records under results/."""
import re

import pytest
from conftest import ROOT

import story
import study
import study_tables
import train
from analyze_tokens import read_records

TABLES, STORY = [], []
for page in study_tables.PAGES:
    TABLES += study_tables.MARKED.findall(page.read_text())
for page in story.PAGES:
    STORY += story.MARKED.findall(page.read_text())


def test_every_table_stands_on_a_page():
    assert {name for name, _ in TABLES} == study_tables.TABLES.keys()


@pytest.mark.parametrize("name, table", TABLES, ids=[t[0] for t in TABLES])
def test_table_is_what_the_records_say(name, table):
    assert study_tables.TABLES[name]() == table


def test_every_table_of_the_story_stands_on_a_page():
    assert {name for name, _ in STORY} == story.TABLES.keys()


@pytest.mark.parametrize("name, table", STORY, ids=[t[0] for t in STORY])
def test_story_is_what_the_records_say(name, table):
    assert story.TABLES[name]() == table


def test_story_holds_whole_runs_of_its_recipes():
    for path in sorted(story.DATA.glob("*.csv")):
        records = read_records(path)
        name, seed = re.fullmatch(r"(.+)-seed(\d+)", path.stem).groups()
        assert int(seed) < story.STORY.recipes[name].seeds, path
        assert [r["step"] for r in records] == list(range(len(records))), path
        assert "final/average_clean" in records[-1], path
        if name in story.RETIRED:                # its schedule is no longer in the code
            continue
        args = train.parse_args(story.STORY.argv_of(name, seed))
        assert len(records) == len(train.plan(args)) + 1, path


def test_raw_records_are_whole_runs():
    """No step is missing, every run was evaluated before and after, and every recipe has seeds 0, 1, ..."""
    seeds = {}
    for path in sorted((ROOT / "results/study").glob("*.csv")):
        records = read_records(path)
        assert [r["step"] for r in records] == list(range(len(records))), path
        assert all("phase" in r for r in records[:-1]), path
        assert "eval/average" in records[0] and "eval/average" in records[-1], path
        name, seed = re.fullmatch(r"(.+)-seed(\d+)", path.stem).groups()
        seeds.setdefault(name, []).append(int(seed))
    assert seeds and all(found == list(range(len(found))) for found in seeds.values()), seeds
    assert seeds.keys() <= study.RECIPES.keys()


def test_recipes_are_command_lines_that_train_accepts():
    for name, recipe in study.RECIPES.items():
        assert recipe.seeds >= 3, name
        if "adaptive" not in recipe.flags:       # that schedule has left the code
            train.parse_args([*study.COMMON.split(), *recipe.flags.split()])


def test_differences_names_flags_that_exist():
    """results/differences.md: every row has four columns after its name, every flag is one of a command's"""
    text = (ROOT / "results/differences.md").read_text()
    flags = {name for group in train.FLAGS.values() for name, *_ in group}
    views = {"spike", "probe", "kl", "paper"}    # analyze_tokens.py's, study.py's
    assert set(re.findall(r"--([a-z_]+)", text)) <= flags | views
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 40 and {line.count("|") for line in rows} == {6}
