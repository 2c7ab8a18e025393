"""results/renamed.py -- stories under other names, for make_base.py. A base that only meets the world's own
tools knows them by heart, and solves nothing with others (content-OOD). Where every story spells its tools
in another way, only the tool list in the system message tells how: the base learns to read it.
"""
import re
from dataclasses import dataclass

from tools import HELD_OUT, TOOL_APP, Task, Turn

# The words of the world's tools, and others that take their places: verbs, nouns, arguments
POOLS = [
    ("create read delete send pay check add remove count".split(),
     "brew fold hide lend mend pack ring wash".split()),
    ("file mail money balance item".split(), "coat drum jar leaf rope stone".split()),
    ("name text sender to amount".split(), "hue owner size tag".split())]


@dataclass
class Renamed(Task):
    """create the file "plan" with text "red" -> brew the leaf "plan" with hue "red", brew_leaf(tag, hue).
    Only the story's tool list tells how its calls are spelled: who learns from many learns to read it."""
    names: dict = None                           # {"create": "brew", "file": "leaf", ...}

    def call(self, apps, name, args):
        own = {new: old for old, new in self.names.items()}
        name = "_".join(own[word] for word in name.split("_"))
        return super().call(apps, name, {own[key]: value for key, value in args.items()})


def renamed(task, rng):
    """-> the story under other names; half of them with the arguments the other way round, or no "with" """
    names, order, dropped = {}, rng.choice((1, -1)), rng.choice(("with ", "no word"))
    for own, others in POOLS:
        names |= zip(own, rng.sample(own + others, len(own)))

    def say(text):
        text = re.sub("[a-z]+", lambda word: names.get(word[0], word[0]), text.replace(dropped, ""))
        return text if order == 1 else re.sub(r"\((\w+), (\w+)\)", r"(\2, \1)", text)
    if any(TOOL_APP.get(say(tool)) == HELD_OUT for tool in TOOL_APP):
        return renamed(task, rng)                # those may never be shown
    docs = {say(tool): say(doc) for tool, doc in task.docs.items()}
    new = Renamed(task.id, task.category, docs, task.apps, task.init, [], names=names)
    for turn in task.turns:
        calls = []
        for tool, args in turn.calls:
            calls.append((say(tool), {say(key): args[key] for key in list(args)[::order]}))
        new.turns.append(Turn(say(turn.user), calls, say(turn.reply), [say(tool) for tool in turn.reveal]))
    return new
