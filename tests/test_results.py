"""The measured tables of the pages are recomputed from the raw records under results/."""
import re

import pytest
from conftest import ROOT

import story
import train
from analyze_tokens import read_records

STORY = []
for page in story.PAGES:
    STORY += story.MARKED.findall(page.read_text())


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


def test_recipes_are_command_lines_that_train_accepts():
    for name, recipe in story.RECIPES.items():
        assert recipe.seeds >= 3, name
        train.parse_args(story.STORY.argv_of(name, 0))


def test_differences_names_flags_that_exist():
    """results/differences.md: every row has four columns after its name, every flag is one of a command's"""
    text = (ROOT / "results/differences.md").read_text()
    flags = {name for group in train.FLAGS.values() for name, *_ in group}
    views = {"spike", "probe", "kl"}             # analyze_tokens.py's
    assert set(re.findall(r"--([a-z_]+)", text)) <= flags | views
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 40 and {line.count("|") for line in rows} == {6}
