"""The real-data world: BFCL's tasks and simulators, ACEBench's entries, ToolACE's dialogues.

The BFCL tests need its package (pip install --no-deps bfcl-eval==2026.3.23 mpmath==1.3.0); the test on
ACEBench's own data needs its folder in the environment variable ACEBENCH_DIR. Else they are skipped."""
import copy
import decimal
import hashlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import acebench
import make_base
import pytest
import toolace
from acebench import ace_equal, acebench_tasks
from conftest import ROOT
from robustness import rewards

import sft_step
import supervision
import tools
import train
from rollout import (Chat, Limits, Message, Said, demonstrate, parse, play, truth_script,
                     write_calls)
from supervision import HBG, cause, reflect_error, reflect_whole, reflection_prompts
from tools import (CATEGORIES, TRAIN_CATEGORIES, BfclWorld, Env, UserError, bfcl_stories, coerce,
                   read_json_lines)

INSTALLED = importlib.util.find_spec("bfcl_eval") and importlib.util.find_spec("mpmath")
needs_bfcl = pytest.mark.skipif(not INSTALLED, reason=f"pip install --no-deps {tools.BFCL_PACKAGES}")
TAG = "<tool_call>\n{}\n</tool_call>"


def story(category, index):
    return bfcl_stories(category)[index]


def world(validation=20):
    return BfclWorld(SimpleNamespace(validation=validation))


def said(script, syntax="A"):
    """[["<tool_call>...", "Done."], ...] -> [Message, ...]"""
    return [parse(text, syntax) for turn in script for text in turn]


def verdicts(task, script, syntax="A"):
    """-> {"": 1.0, "_strict": 0.0}, of a conversation under the lenient rule, as evaluations play it"""
    messages, env = said(script, syntax), task.env(syntax)
    for message in messages:
        if env.status is None:
            env.step(message)
    return task.verdicts(syntax, messages, env.grade())


def one(name, **args):
    return parse(write_calls([(name, args)]))


def with_apps(*apps, init=None, padded=False):
    """An Env of one turn that can call every tool of `apps`."""
    docs = {name: "" for name, app in tools.bfcl().app_of.items() if app in apps}
    return Env(tools.BfclTask("t", "base", docs, list(apps), init or {}, [tools.Turn("?", [], "")], padded))


def result(env, name, **args):
    return env.step(one(name, **args)).removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")


# --- ground truth ------------------------------------------------------------------------------------------
@needs_bfcl
def test_ground_truth_passes():
    """Both verdicts on all 800, in both syntaxes; and what the simulators answer, byte by byte."""
    failed, digest = [], hashlib.sha256()
    for category in CATEGORIES:
        file = tools.bfcl().data / "possible_answer" / f"BFCL_v4_multi_turn_{category}.json"
        for index, truth in enumerate(read_json_lines(file)):
            task, syntax = story(category, index), "AB"[index % 2]
            both = verdicts(task, truth_script(task, syntax), syntax)
            failed += [(task.id, name) for name, reward in both.items() if reward != 1]
            apps = task.fresh_apps()
            for texts, turn in zip(truth["ground_truth"], task.turns, strict=True):
                for text, (name, args) in zip(texts, turn.calls, strict=True):
                    method = getattr(apps[tools.bfcl().app_of[name]], name)
                    answer = tools.run_tool(method, copy.deepcopy(args))
                    digest.update(f"{task.id}|{text}|{answer}\n".encode())
    assert failed == [("multi_turn_miss_func_49", "_strict")]        # needs its tool before the reveal
    assert digest.hexdigest() == "af4e196a8ef4951c6f174bcc724ecf12eb54e9692c92e3d2caf5a49431ad091f"


@needs_bfcl
def test_results_are_the_same_in_every_process():
    """Two of BFCL's messages print a Python set, whose order is another one in every process"""
    travel, tickets = (tools.bfcl().classes[kind]() for kind in ("TravelAPI", "TicketAPI"))
    travel.access_token, travel.token_expires_in, travel.credit_card_list = "t", 9, {"1": {"balance": 1.0}}
    answer = tools.run_tool(travel.book_flight, {
        "access_token": "t", "card_id": "1", "travel_date": "2024-11-12", "travel_from": "SFO",
        "travel_to": "LAX", "travel_class": "coach"})
    assert "Must be one of {'business', 'economy', 'first'}" in answer
    tickets.ticket_queue = [{"id": 1}]
    answer = tools.run_tool(tickets.edit_ticket, {"ticket_id": 1, "updates": dict.fromkeys("gbhafdec")})
    assert answer == '{"error": "Invalid fields for update: a, b, c, d, e, f, g, h"}'


def spoil(task):
    """-> {what: script}: ways to be wrong, and ways to be right that look odd"""
    right = truth_script(task)
    full = [t for t, turn in enumerate(task.turns) if turn.calls]
    last, empty = full[-1], [t for t, turn in enumerate(task.turns) if not turn.calls]

    def changed(t, messages):
        return [messages if i == t else turn for i, turn in enumerate(right)]
    junk = TAG.format('{"name": "junk", "arguments": {}}')
    nothing = [["Done."] for _ in right]
    ways = {"right": right, "nothing": nothing,
            "last call dropped": changed(last, right[last][:-2] + ["Done."]),
            "last call is junk": changed(last, right[last][:-2] + [junk, "Done."]),
            "doubled": [sum(([text, text] for text in turn[:-1]), []) + turn[-1:] for turn in right],
            "reversed": [turn[:-1][::-1] + turn[-1:] for turn in right],
            "all at once": [sum((turn[:-1] for turn in right), []) + ["Done."], *nothing[1:]],
            "with junk": [turn[:-1] + [junk] + turn[-1:] if turn[:-1] else turn for turn in right]}
    if empty:
        ways["call where none is right"] = changed(empty[0], right[full[0]][:1] + ["Done."])
    return ways


def as_python(text):
    """A message -> its calls as BFCL's own executor reads them: ["ls(a=True)"]"""
    written = []
    for name, args in parse(text).calls:
        written.append(f"{name}({', '.join(f'{k}={v!r}' for k, v in args.items())})")
    return written


@needs_bfcl
@pytest.mark.parametrize("category", CATEGORIES)
def test_verdict_is_the_official_one(category):
    """The package's own checker on the same conversations; its objects live on, so every model name is used
    once."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker
    file = f"BFCL_v4_multi_turn_{category}.json"
    entries = read_json_lines(tools.bfcl().data / file)
    truths = read_json_lines(tools.bfcl().data / "possible_answer" / file)
    seen = set()
    for index in range(category == "long_context", 200, 9):
        task = story(category, index)
        for i, (way, script) in enumerate(spoil(task).items()):
            decoded = []
            for turn in script:
                decoded.append([as_python(text) for text in turn[:-1]])
            truth, name = truths[index]["ground_truth"], f"test_{category}_{i}"
            official = multi_turn_checker(decoded, truth, entries[index], category, name)["valid"]
            assert verdicts(task, script)[""] == official, (task.id, way)
            seen.add((way, official))
    assert seen >= {("right", True), ("nothing", False), ("last call dropped", False), ("doubled", False),
                    ("with junk", True)}
    assert category not in ("miss_func", "miss_param") or ("call where none is right", True) in seen


@needs_bfcl
def test_strict_verdict():
    for index in range(0, 60, 7):                # calls where none is right: forgiven by one verdict only
        for category in ("miss_func", "miss_param"):
            task = story(category, index)
            script = truth_script(task)
            empty = next(t for t, turn in enumerate(task.turns) if not turn.calls)
            calls = [text for turn in script for text in turn[:-1] if parse(text).calls[0][0] in task.docs]
            if calls:
                script[empty] = [calls[0], "no"]
                assert verdicts(task, script)["_strict"] == 0
    task = story("base", 0)
    script = truth_script(task)
    script[0][-1] = "<tool_call>"
    assert verdicts(task, script) == {"": 1, "_strict": 0}


@needs_bfcl
def test_withheld_tools_are_not_shown_but_answer():
    """As BFCL's own executor does. The strict rule executes alike and fails the episode."""
    for task in bfcl_stories("miss_func")[:40]:
        k = next(t for t, turn in enumerate(task.turns) if turn.reveal)
        env = Env(task)
        for turn in truth_script(task)[:k]:
            answers = [env.step(parse(text)) for text in turn]
        for line in answers[-1].splitlines()[:-1]:
            assert json.loads(line)["function"]["name"] in task.turns[k].reveal
        for name in task.turns[k].reveal:
            assert f'"name": "{name}"' not in task.system("A") + task.system("B")
            early, late = Env(task, closing="strict"), Env(task, closing="strict")
            late.callable.add(name)
            assert result(early, name) == result(late, name) and "there is no tool" not in result(early, name)
            assert (early.failed_turn, late.failed_turn) == (0, None)
        assert "there is no tool" in result(Env(task), "junk")


@needs_bfcl
def test_one_execution_in_training_evaluation_and_replay(small_model):
    """A policy calls the withheld tool before its reveal, and then does all that the ground truth does. The
    call is executed twice, so the state decides: right where it bears repetition, wrong in 20 of the 100 test
    stories. The reward of the rollout, the verdict and the package's own checker agree on each."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker
    _, chat = small_model
    file, wrong = "BFCL_v4_multi_turn_miss_func.json", []
    entries = read_json_lines(tools.bfcl().data / file)
    truths = read_json_lines(tools.bfcl().data / "possible_answer" / file)
    for index in world().stories("test"):
        task, script = story("miss_func", index), truth_script(story("miss_func", index))
        k = next(t for t, turn in enumerate(task.turns) if turn.reveal)
        early = [call for call in task.turns[k].calls if call[0] in task.turns[k].reveal]
        script[k - 1] = [write_calls(early[:1]), "I cannot."]
        episode = play(chat, task.env(), script, Limits(total_tokens=10**6))
        messages = [parse(span.text) for span in episode.spans if span.who == "model"]
        decoded = []
        for turn in script:
            decoded.append([as_python(text) for text in turn[:-1]])
        truth, name = truths[index]["ground_truth"], f"early_{index}"
        official = multi_turn_checker(decoded, truth, entries[index], "miss_func", name)["valid"]
        assert [m.text for m in messages] == sum(script, [])
        assert task.verdicts("A", messages, episode.reward) == {"": official, "_strict": 0}, task.id
        assert episode.reward == official and episode.status == "finished"
        wrong += [] if official else [index]
    assert len(wrong) == 20


@needs_bfcl
def test_rewards_without_the_work():
    """The first 20 stories of each category; all of them: results/robustness/rewards.md"""
    lines = rewards.table("bfcl", rewards.bfcl_tasks(20)).splitlines()
    assert lines[2:5] == ["| the ground truth | 20, 20 of 20 | 20, 20 of 20 | 20, 20 of 20 | 20, 20 of 20 |",
                          "| nothing | 0, 0 of 20 | 0, 0 of 20 | 0, 0 of 20 | 0, 0 of 20 |",
                          "| junk in every turn | 0, 0 of 20 | 0, 0 of 20 | 0, 0 of 20 | 0, 0 of 20 |"]
    assert lines[7] == ("| ... and then junk in every turn | 3, 3 of 20 | 3, 0 of 20 | 3, 0 of 20 "
                        "| 3, 3 of 20 |")


# --- format ------------------------------------------------------------------------------------------------
@needs_bfcl
def test_system_message_is_what_qwen_was_trained_on():
    system = story("base", 0).system("A")
    head, rest = system.split("<tools>\n")
    docs, tail = rest.split("\n</tools>")
    you_are, about_tools = head.split("\n\n# Tools\n\n")
    assert you_are == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert about_tools.startswith("You may call one or more functions to assist with the user query.\n\n")
    assert tail.endswith(TAG.format('{"name": <function-name>, "arguments": <args-json-object>}'))
    kinds, bfcl = set(), tools.bfcl()

    def walk(schema):
        kinds.add(schema["type"])
        for child in schema.get("properties", {}).values():
            walk(child)
        if "items" in schema:
            walk(schema["items"])
    for doc in bfcl.docs.values():
        assert set(doc["function"]) == {"name", "description", "parameters"}
        walk(doc["function"]["parameters"])
    assert kinds == {"object", "string", "number", "integer", "array", "boolean"} and len(bfcl.docs) == 128
    apps = ("TwitterAPI", "GorillaFileSystem")
    assert [json.loads(line) for line in docs.splitlines()] == [
        doc for name, doc in bfcl.docs.items() if bfcl.app_of[name] in apps]


def test_coerce():
    schema = {"properties": {"a": {"type": "number"}, "n": {"type": "integer"},
                             "xs": {"type": "array", "items": {"type": "number"}}}}
    got = coerce({"a": 5, "n": 2.0, "xs": [1, 2.5], "b": 7}, schema)
    assert json.dumps(got) == '{"a": 5.0, "n": 2, "xs": [1.0, 2.5], "b": 7}'
    assert json.dumps(coerce({"a": True, "n": "x", "xs": "y"}, schema)) == '{"a": true, "n": "x", "xs": "y"}'


def to_float(value):
    return float(value) if type(value) is int else value


def to_int(value):
    return int(value) if type(value) is float and value.is_integer() else value


@needs_bfcl
@pytest.mark.parametrize("change", [to_float, to_int])
def test_numbers_may_be_written_either_way(change):
    for index in range(0, 200, 5):
        task, script = story("base", index), []
        for turn in task.turns:
            script.append([])
            for name, args in turn.calls:
                script[-1].append(write_calls([(name, {k: change(v) for k, v in args.items()})]))
            script[-1].append("Done.")
        assert verdicts(task, script) == {"": 1, "_strict": 1}, task.id


@needs_bfcl
def test_splits_are_disjoint_by_story():
    parts = [world().stories(split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [80, 20, 100] and sorted(sum(parts, [])) == list(range(200))
    half = json.dumps(sorted(parts[0] + parts[1])).encode()
    assert hashlib.sha256(half).hexdigest().startswith("efaae354797fa5de")       # the paper's training half
    assert len(world(5).stories("train")) == 95 and world(5).stories("test") == parts[2]
    numbers = []
    for split in ("train", "validation", "test"):
        tasks = [task for c in world().categories(split) for task in world().tasks(split, c)]
        numbers.append({task.id.rsplit("_", 1)[1] for task in tasks})
    assert not numbers[0] & numbers[1] and not (numbers[0] | numbers[1]) & numbers[2]
    assert world().categories("test") == CATEGORIES and world().categories("train") == TRAIN_CATEGORIES
    assert [len(world().mixed(split, 1000)) for split in ("train", "validation")] == [240, 60]
    with pytest.raises(AssertionError):
        world().tasks("train", "long_context")


# --- hostile calls -----------------------------------------------------------------------------------------
@needs_bfcl
def test_hostile_calls_are_observations(tmp_path):
    """No name or argument of a model reaches anything but a documented tool of this task."""
    marker = tmp_path / "marker"
    payload = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    task = story("base", 0)
    env = Env(task)
    deep = []
    for _ in range(300):
        deep = [deep]
    for name, args in [(payload, {}), ("__init__", {}), ("_load_scenario", {"scenario": {}}), ("root", {}),
                       ("globals", {}), ("os.system", {"command": payload}), ("ls", {payload: 1}),
                       ("ls", {"self": 1}), ("ls", {"a": 1, "b": 2}), ("cat", {}), ("cat", {"file_name": []}),
                       ("cat", {"file_name": {"a": 1}}), ("mkdir", {"dir_name": deep}),
                       ("tail", {"file_name": "x", "lines": 1e999}), ("mean", {"numbers": [1]}), ("", {}),
                       ("no\0name", {}), ("cat", {"file_name": payload}),
                       ("grep", {"file_name": None, "pattern": payload})]:
        for syntax in "AB":
            message = parse(write_calls([(name, args)], syntax), syntax)
            if message.calls:
                answer = env.step(message)
                assert "rror" in answer, (name, args, answer)
    for body in ('{"name": "ls"}', '{"name": ["ls"], "arguments": {}}', "ls()", payload):
        assert "rror" in env.step(parse(TAG.format(body)))
    for text in (f"[ls(a={payload})]", f"[{payload}]", "[ls(**{})]", "[ls().__class__()]", "[(lambda: 1)()]"):
        assert parse(text, "B").calls == []
    assert not marker.exists()
    assert all(task.state(env.apps[a]) == task.state(env.truth[a]) for a in env.apps)


@needs_bfcl
def test_a_call_that_would_hang_is_stopped():
    def double(env, levels):
        """d1 holds d0 twice, d2 holds d1 twice, ...: 2 ** levels paths in a few hundred bytes"""
        env.step(one("mkdir", dir_name="d0"))
        for i in range(levels):
            old, new = f"d{i}", f"d{i + 1}"
            for name, args in [("mkdir", {"dir_name": new}), ("cp", {"source": old, "destination": "x"}),
                               ("mv", {"source": "x", "destination": new}),
                               ("cp", {"source": old, "destination": new})]:
                assert '"error"' not in result(env, name, **args)

    def all_of_them(times, answers):
        env = with_apps("GorillaFileSystem", "MathAPI")
        double(env, 40)
        for name, args in [("find", {}), ("du", {}), ("square_root", {"number": 2, "precision": 200_000_000}),
                           ("power", {"base": 7, "exponent": 50_000_000}),
                           ("power", {"base": "7", "exponent": 2}),
                           ("logarithm", {"value": 10, "base": 2, "precision": 1_000_000}),
                           ("logarithm", {"value": "1e999999999999", "base": 2, "precision": 10}),
                           ("round_number", {"number": 1.5, "decimal_places": 10 ** 9}),
                           ("multiply", {"a": 10 ** 4000, "b": 10 ** 4000})]:
            start = time.perf_counter()
            answers.append((name, result(env, name, **args)))
            times.append(time.perf_counter() - start)
    times, answers = [], []                      # in a thread, because signals never reach one
    thread = threading.Thread(target=all_of_them, args=(times, answers), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and len(answers) == 9, "a call hangs"
    assert all("rror" in text for _, text in answers), answers
    assert "takes too long" in answers[0][1] and max(times) < 5


def cycle_of_folders(name):
    """cd t, which holds x, which holds s, which holds x, ...: without any folder put into itself"""
    env, x, s = with_apps("GorillaFileSystem"), name + "x", name + "s"
    for tool, args in [("mkdir", {"dir_name": x}), ("mkdir", {"dir_name": s}),
                       ("mv", {"source": x, "destination": s}), ("cp", {"source": s, "destination": "t"}),
                       ("mv", {"source": s, "destination": "t"}), ("cd", {"folder": "t"}),
                       ("mv", {"source": s, "destination": x})]:
        assert "rror" not in result(env, tool, **args)
    return env


@needs_bfcl
def test_directories_that_contain_themselves():
    env = with_apps("GorillaFileSystem")
    result(env, "mkdir", dir_name="d")
    for name in ("cp", "mv"):
        assert "are the same" in result(env, name, source="d", destination="d")
    assert result(env, "find") == '{"matches": ["./d"]}'
    env = cycle_of_folders("")
    for name in ("find", "du"):
        assert "rror" in result(env, name)
    for name in ("pwd", "ls"):
        assert "rror" not in result(env, name)
    copy.deepcopy(env)
    pickle.dumps(env)
    env.step(parse("Done."))
    assert env.status == "finished"


@needs_bfcl
def test_memory_of_a_call_is_bounded():
    """`find` in a cycle of folders with long names: half a gigabyte of paths before Python's stack is full"""
    env = cycle_of_folders("n" * 1000)
    tracemalloc.start()
    try:
        answer = result(env, "find")
        _, peak = tracemalloc.get_traced_memory()
        assert tracemalloc.is_tracing()          # ours goes on
    finally:
        tracemalloc.stop()
    assert answer == "Error during execution: the call takes too long, or too much memory" and peak < 20e6
    result(env, "ls")
    assert not tracemalloc.is_tracing()


@needs_bfcl
def test_a_long_result_keeps_its_end():
    env = with_apps("GorillaFileSystem")
    result(env, "touch", file_name="f")
    result(env, "echo", content="0123456789" * 30_000, file_name="f")
    whole = '{"file_content": "' + "0123456789" * 30_000 + '"}'
    assert result(env, "cat", file_name="f") == whole[-262_144:]
    result(env, "echo", content="0123456789" * 26_000, file_name="f")
    assert result(env, "cat", file_name="f") == whole[:18] + "0123456789" * 26_000 + '"}'


@needs_bfcl
def test_no_call_leaks_into_another_episode():
    """Process-wide state of the simulators: default lists, shared cards, numeric precision."""
    import mpmath
    for _ in range(2):
        env = with_apps("TwitterAPI", init={"TwitterAPI": {"authenticated": True}})
        assert '"mentions": []' in result(env, "post_tweet", content="x")
        result(env, "mention", tweet_id=0, mentioned_usernames=["@leak"])
    args = ["@a"]
    call = [("post_tweet", {"content": "y", "mentions": args})]
    env.step(Message("", "call", call))
    result(env, "mention", tweet_id=1, mentioned_usernames=["@leak"])
    assert args == ["@a"]                        # what the caller holds (a task's ground truth!) stays

    seen = []
    for _ in range(2):
        env = with_apps("TravelAPI", padded=True)
        cards = env.apps["TravelAPI"].credit_card_list
        seen.append(copy.deepcopy(cards))
        assert cards == env.truth["TravelAPI"].credit_card_list
        for card in cards.values():
            card["balance"] -= 200
    assert seen[0] == seen[1] and len(seen[0]) > 5

    env = with_apps("MathAPI")
    before = mpmath.mp.dps, decimal.getcontext().prec
    digits = result(env, "logarithm", value=10, base=2, precision=50)
    result(env, "square_root", number=2, precision=70)
    assert (mpmath.mp.dps, decimal.getcontext().prec) == before and len(digits) > 50

    env = Env(story("base", 0))                  # a branch and a stored copy go their own way
    branch, stored = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    for text in truth_script(env.task)[0][:-1]:
        env.step(parse(text))
    changed, *others = [env.task.state(e.apps["GorillaFileSystem"]) for e in (env, branch, stored)]
    assert changed != others[0] == others[1]


@needs_bfcl
def test_concurrent_episodes_of_one_task():
    """8 threads, one task each time: the entries whose tools share numeric precision, and two ordinary
    ones."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for index in 3 * (32, 49, 57, 59) + (0, 150):
            task, logs = story("base", index), []

            def run():
                env = Env(task)
                log = [env.step(message) for message in said(truth_script(task))]
                logs.append((log, env.grade()))
            threads = [threading.Thread(target=run) for _ in range(8)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            assert len(logs) == 8 and all(log == logs[0] for log in logs) and logs[0][1] == 1
    finally:
        sys.setswitchinterval(interval)


# --- supervision and training ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder with a random Qwen2 whose tokenizer knows the words of BFCL's system messages: prompts of 2 to
    4 thousand tokens instead of one per byte. -> (folder, Chat)"""
    systems = [task.system(syntax) for task in bfcl_stories("base")[::10] for syntax in "AB"]
    tokenizer = make_base.tiny_tokenizer("\n".join(systems))
    folder = tmp_path_factory.mktemp("model")
    make_base.tiny_model(len(tokenizer), 32, 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, Chat(tokenizer)


@needs_bfcl
def test_supervision_on_real_tasks(small_model):
    _, chat = small_model
    limits = train.limits_of(train.parse_args(["--world", "bfcl", "--model", "x"]))
    for task in [task for c in TRAIN_CATEGORIES for task in world().tasks("train", c, 4)]:
        episode = demonstrate(chat, task, "A", limits)
        assert episode.states.count("reply") == len(task.turns) and set(episode.states) == {"call", "reply"}
        for turn in task.turns:
            shown = write_calls(turn.calls) if turn.calls else "no call is right"
            assert shown in HBG.hint_text(task, "A")
        wrong = play(chat, Env(task), [["Done."] for _ in task.turns], limits)
        first = next(t for t, turn in enumerate(task.turns) if turn.calls)
        assert (wrong.reward, wrong.failed_turn) == (0, first)
        assert cause(task, wrong, first, "A") == "no call where one is right"
        assert cause(task, episode, first, "A") is None
        assert [kind for kind, _ in reflection_prompts(task, wrong, "A")] == ["whole", "error"]
        assert write_calls(task.turns[first].calls) in reflect_whole(task, wrong, "A")
        error = reflect_error(task, wrong, "A")
        assert error.startswith("cause: no call where one is right\nfix: <tool_call>")


RUN = ["--world", "bfcl", "--threads", "1", "--prompts", "1", "--group", "2", "--updates", "1",
       "--eval_tasks", "1", "--train_tasks", "3", "--max_messages", "12", "--max_message_tokens", "200",
       "--sft_batch", "2", "--max_total_tokens", "12000", "--max_observation_tokens", "64",
       "--test_total_tokens", "12500", "--test_observation_tokens", "80",
       "--kl_weight", "0", "--eval_every", "-1"]


@needs_bfcl
def test_train_and_evaluate_end_to_end(small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.cli([*RUN, "--model", str(small_model[0]), "--signal", "prs", "--schedule", "synchronous",
                      "--steps", "1", "--out", "r"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    evals, tests = ([r for r in rows if f"{name}/average" in r] for name in ("eval", "test"))
    assert [r["step"] for r in evals] == [0, 1] and [r["step"] for r in tests] == [1]    # test tasks: once
    assert {"eval/base", "eval/base_strict", "eval/base_clean", "eval/average_strict", "eval/format_ood",
            "eval/format_ood_strict", "eval/format_ood_clean"} <= set(evals[0])
    assert "eval/long_context" not in evals[0] and "eval/content_ood" not in evals[0]
    assert {"test/long_context", "test/long_context_strict", "test/long_context_clean"} <= set(tests[0])
    trained = next(r for r in rows if r.get("phase") == "rl+sft")
    assert trained["sft_loss"] > 0 and trained["skipped_updates"] == 0
    assert train.cli([*RUN, "--model", "r", "--eval_only", "--out", "e"]) == 0
    scores = json.loads((tmp_path / "e/eval.json").read_text())
    assert {"long_context", "base_strict", "average", "average_clean"} <= set(scores)


@needs_bfcl
@pytest.mark.parametrize("validation, n, messages", [(0, 300, 2966), (1, 297, 2931)])
def test_an_epoch_is_the_papers_23_updates(monkeypatch, validation, n, messages):
    """128 assistant messages each: 69 updates in pure SFT, up to 46 in a phase between RL phases."""
    monkeypatch.setattr(sft_step, "sft_update", lambda model, optimizer, rows, lr, micro_tokens: {
        "sft_loss": 0.0, "grad_norm": 0.0, "skipped_updates": 0})
    rows = []
    for task in world(validation).mixed("train", 1000):
        rows.append(SimpleNamespace(states=["call or reply" for turn in truth_script(task) for text in turn]))
    assert (len(rows), sum(len(row.states) for row in rows)) == (n, messages)
    flags = ["--world", "bfcl", "--model", "x", "--signal", "sft", "--schedule"]
    for more, updates in ((["sft", "--sft_epochs", "1"], 23), (["sft"], 69), (["interleaved"], 46)):
        metrics = sft_step.sft_phase(None, None, rows, train.parse_args(flags + more), "seed")
        assert metrics["sft_updates"] == updates


@needs_bfcl
def test_without_validation_all_stories_are_trained(small_model, tmp_path, monkeypatch):
    """--validation 0: the test tasks at the end are the only evaluation, under limits of their own; the probe
    looks at training tasks."""
    splits = {split: world(0).stories(split) for split in ("train", "validation", "test")}
    assert [len(of) for of in splits.values()] == [100, 0, 100] and splits["train"][:3] == [66, 187, 101]
    monkeypatch.chdir(tmp_path)
    used, real = [], train.rollout

    def spy(engine, chat, envs, limits, begun, *args, **kw):
        used.append((limits.total_tokens, limits.observation_tokens, len(envs)))
        return real(engine, chat, envs, limits, begun, *args, **kw)
    monkeypatch.setattr(train, "rollout", spy)
    assert train.cli([*RUN, "--model", str(small_model[0]), "--validation", "0", "--signal", "sft",
                      "--schedule", "sft", "--sft_epochs", "1", "--eval_every", "1", "--out", "all"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "all/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "test/average" in r] == [1] and "test/long_context" in rows[-1]
    assert not any("eval/average" in r for r in rows)
    assert [r["step"] for r in rows if "p/open|text" in r] == [0, 1]
    assert used == [(12_500, 80, 5)]                     # four categories and the other syntax, once


def test_mistakes_are_one_sentence(monkeypatch, capsys):
    for name in ("bfcl_eval", "bfcl_eval.constants.executable_backend_config"):
        monkeypatch.setitem(sys.modules, name, None)
    tools.bfcl.cache_clear()
    bfcl_stories.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps bfcl-eval==2026.3.23 mpmath==1.3.0"):
        world().tasks("train", "base")
    for argv, word in ((["--world", "bfcl"], "--model"), (["--validation", "100"], "--validation")):
        with pytest.raises(SystemExit):
            train.parse_args(argv)
        assert word in capsys.readouterr().err


# --- ACEBench ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ace_folder(tmp_path_factory):
    """ACEBench's layout, two entries made by hand."""
    folder = tmp_path_factory.mktemp("ace")
    (folder / "possible_answer").mkdir()
    docs = [{"name": "weather", "description": "Weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"]}}]
    entries = [{"id": "a_0", "question": "user: Weather in New York for 3 days?\n", "function": docs,
                "time": "It is Monday."},
               {"id": "a_1", "question": "user: Weather in Rome and Oslo?\n", "function": docs, "time": ""}]
    truths = [{"id": "a_0", "ground_truth": [{"weather": {"city": "New York", "days": 3}},
                                             {"weather": {"city": "NYC"}}]},
              {"id": "a_1", "ground_truth": {"weather_1": {"city": "Rome"}, "weather_2": {"city": "Oslo"}}}]
    for name, lines in (("data_normal_x.json", entries), ("possible_answer/data_normal_x.json", truths)):
        (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return folder


def ace_grade(task, said, syntax):
    """said: calls, or the message itself -> reward, status"""
    env = task.env(syntax, "strict")
    text = said if isinstance(said, str) else write_calls(said, syntax)
    assert env.step(parse(text, syntax)) is None
    return env.grade(), env.status


@pytest.mark.parametrize("syntax", ["A", "B"])
def test_acebench_rules(ace_folder, syntax):
    first, second = acebench_tasks(ace_folder)
    assert acebench_tasks(ace_folder, 1) == [first]
    assert first.system(syntax).endswith("\n\nIt is Monday.") and "Monday" not in second.system(syntax)
    assert first.turns[0].user == "Conversation history 1..t:\nuser: Weather in New York for 3 days?\n"
    for args, reward in [({"city": "the city of new-york", "days": 3}, 1), ({"city": "New York"}, 1),
                         ({"city": "N.Y.C."}, 1), ({"city": "New York", "days": 4}, 0), ({"days": 3}, 0),
                         ({"city": "New York", "unit": "C"}, 0), ({"city": 5}, 0)]:
        assert ace_grade(first, [("weather", args)], syntax) == (reward, "finished"), args
    right = ("weather", {"city": "New York"})
    for said in ([("Weather", {"city": "New York"})], [right, right], "I cannot.", "", "<tool_call>"):
        assert ace_grade(first, said, syntax) == (0, "finished"), said
    cut = first.env(syntax)
    assert cut.step(parse(write_calls([right], syntax), syntax, ended=False)) is None
    assert (cut.grade(), cut.status) == (0, "message_tokens_limit")
    rome, oslo = ("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})
    assert ace_grade(second, [oslo, rome], syntax)[0] == 1 and ace_grade(second, [oslo, oslo], syntax)[0] == 0


def test_acebench_reads_what_cannot_be_read_as_wrong(ace_folder):
    first, _ = acebench_tasks(ace_folder)
    good = write_calls([("weather", {"city": "New York"})])
    assert ace_grade(first, good, "A")[0] == 1 and ace_grade(first, good + TAG.format("{"), "A")[0] == 0


def test_acebench_values():
    assert ace_equal({"a": ["X y"], "b": True}, {"a": ["xy"], "b": True})
    assert not ace_equal({"a": ["X yz"]}, {"a": ["xy"]}) and ace_equal("X yz", "xy")
    assert ace_equal("true", True) and not ace_equal(False, True) and not ace_equal(3, "3")


ACE_SCORES = {"ace_brackets", "ace_brackets_clean", "ace_tags", "ace_tags_clean"}


def test_acebench_evaluates_a_run(ace_folder, folder, tmp_path, capsys):
    """Greedily, so the same twice; and the command line of the script"""
    args = ["--model", "runs/first", "--data", str(ace_folder), "--max_message_tokens", "50",
            "--threads", "1"]
    assert acebench.cli([*args, "--out", str(tmp_path / "ace.json")]) == 0
    out, scores = capsys.readouterr().out, json.loads((tmp_path / "ace.json").read_text())
    assert scores.keys() == ACE_SCORES and all(f"\n{name} " in out for name in scores)
    done = subprocess.run([sys.executable, str(ROOT / "results/acebench.py"), *args], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == out, done.stderr


@pytest.mark.parametrize("n, solved", [("1", 1.0), ("2", 0.5)])
def test_acebench_scores(ace_folder, folder, tmp_path, monkeypatch, n, solved):
    """A model that solves the first entry, in brackets"""
    def engine(args, model, chat):
        said = chat.message("[weather(city='New York')]")

        keys, nothing = [], lambda *args: None
        collect = lambda: [Said(keys.pop(), list(said), [0.0] * len(said))]
        return SimpleNamespace(load=nothing, sleep=nothing, reset=nothing, add=lambda r: keys.append(r.key),
                               collect=collect)
    monkeypatch.setattr(train, "make_engine", engine)
    out = tmp_path / "ace.json"
    args = ["--model", "runs/first", "--data", str(ace_folder), "--n", n, "--out", str(out)]
    assert acebench.cli(args) == 0
    assert json.loads(out.read_text()) == dict.fromkeys(ACE_SCORES, 0.0) | {
        "ace_brackets": solved, "ace_brackets_clean": solved}


def test_acebench_mistakes(ace_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data_normal"):
        acebench_tasks(ace_folder / "possible_answer" / "none")
    for argv, words in ((["--model", "x", "--data", "nowhere"], "acebench.py: error: --data nowhere has no"),
                        (["--model", "no/such/model", "--data", str(ace_folder)], "no/such/model")):
        assert acebench.cli([*argv, "--out", "ace.json"]) == 2
        err = capsys.readouterr().err.strip()
        assert words in err and "\n" not in err and not list(tmp_path.iterdir())


ENTRY, ANSWER = b'{"id": "a", "question": "Q", "function": []}', b'{"id": "a", "ground_truth": {"f": {}}}'
QUESTIONS, ANSWERS = "data_normal_x.json", "possible_answer/data_normal_x.json"
HALF = b'"\\ud800"'                              # half a character, which no tokenizer takes
BROKEN_ACE = [                                   # (questions, answers, where and what is said of it)
    (b"", ANSWER, QUESTIONS + " cannot be read: it is empty"),
    (ENTRY, b"", ANSWERS + " cannot be read: it is empty"),
    (ENTRY, None, ANSWERS + " cannot be read: No such file"),
    (ENTRY.decode().encode("utf-16"), ANSWER, QUESTIONS + ":1 cannot be read: it is not UTF-8"),
    (ENTRY, ANSWER + b"\n\xe9", ANSWERS + ":2 cannot be read: it is not UTF-8"),
    (ENTRY + b"\n\n{", ANSWER, QUESTIONS + ":3 cannot be read: Expecting property name"),
    (ENTRY + b'\n{"a":' + b"[" * 100_000, ANSWER, QUESTIONS + ":2 cannot be read: maximum recursion"),
    (ENTRY + b"\n" + b"9" * 5000, ANSWER, QUESTIONS + ":2 cannot be read: Exceeds the limit"),
    (b"[1]", ANSWER, QUESTIONS + ":1 is no entry of ACEBench (TypeError"),
    (ENTRY + b"\n7", ANSWER, QUESTIONS + ":2 is no entry of ACEBench (TypeError"),
    (ENTRY + b"\n" + ENTRY, ANSWER, QUESTIONS + ":2 is no entry of ACEBench (ValueError('a is there twice"),
    (ENTRY, ANSWER + b"\n" + ANSWER, ANSWERS + ":2 is no entry of ACEBench (ValueError('a is there twice"),
    (b'{"id": "b"}', ANSWER, QUESTIONS + ":1 is no entry of ACEBench (KeyError('b'"),
    (b'{"id": ["a"]}', ANSWER, QUESTIONS + ":1 is no entry of ACEBench (TypeError"),
    (b'{"id": "a", "question": 5, "function": []}', ANSWER, QUESTIONS + ":1 is no entry of ACEBench"),
    (ENTRY.replace(b'"Q"', HALF), ANSWER, QUESTIONS + ":1 is no entry of ACEBench (UnicodeEncodeError"),
    (ENTRY.replace(b"[]", b'[{"name": 5}]'), ANSWER, QUESTIONS + ":1 is no entry of ACEBench (TypeError"),
    (ENTRY.replace(b"[]", b'[{"name": "f", "parameters": []}]'), ANSWER, QUESTIONS + ":1 is no entry"),
    (ENTRY.replace(b"[]", b'[{"name": "f", "parameters": {"required": "x"}}]'), ANSWER, "'x' is no list"),
    (ENTRY.replace(b"[]", b'[{"name": "f", "parameters": {"required": [[]]}}]'), ANSWER, ":1 is no entry"),
    (ENTRY.replace(b"}", b', "time": 5}'), ANSWER, QUESTIONS + ":1 is no entry of ACEBench (TypeError"),
    (ENTRY, b'{"id": "a", "ground_truth": []}', QUESTIONS + ":1 is no entry of ACEBench (IndexError"),
    (ENTRY, b'{"id": "a", "ground_truth": {"f": 3}}', "3 is no dict"),
    (ENTRY, b'{"id": "a"}', ANSWERS + ":1 is no entry of ACEBench (KeyError('ground_truth'"),
]


@pytest.mark.parametrize("k", range(len(BROKEN_ACE)))
def test_acebench_broken_files(k, tmp_path, capsys):
    questions, answers, said = BROKEN_ACE[k]
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / QUESTIONS).write_bytes(questions)
    if answers is not None:
        (tmp_path / ANSWERS).write_bytes(answers)
    assert acebench.cli(["--model", "x", "--data", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"acebench.py: error: {tmp_path}/") and said in err and err.count("\n") == 1


def test_acebench_out_of_nowhere(ace_folder, capsys):
    assert acebench.cli(["--model", "x", "--data", str(ace_folder), "--out", "no/such/ace.json"]) == 2
    assert "--out no/such/ace.json: there is no such folder" in capsys.readouterr().err


@pytest.mark.skipif("ACEBENCH_DIR" not in os.environ,
                    reason="ACEBENCH_DIR does not name ACEBench's English data")
def test_acebench_ground_truth():
    tasks = acebench_tasks(os.environ["ACEBENCH_DIR"])
    assert len(tasks) == 823
    for syntax in "AB":
        for task in tasks:
            assert ace_grade(task, task.turns[0].calls, syntax)[0] == 1, task.id
            assert ace_grade(task, "I cannot do that.", syntax)[0] == 0, task.id


# --- ToolACE -----------------------------------------------------------------------------------------------
def toolace_entries():
    """Two that can be read, four that cannot"""
    system = ('Here is a list of functions in JSON format that you can invoke:\n'
              '[{"name": "Market Trends API", "description": "Trends.", "parameters": {"type": "dict", '
              '"properties": {"kind": {"type": "string"}}, "required": ["kind"]}}, '
              '{"name": "f", "description": "", "parameters": {"type": "dict", "properties": {}}}]. '
              "\nShould you decide to return the function call(s), put them as [func(a=1)]")

    def talk(*values):
        turns = zip(("user", "assistant", "tool", "assistant"), values)
        return {"system": system, "conversations": [{"from": who, "value": value} for who, value in turns]}
    good = talk("Trends?", '[Market Trends API(kind="INDEX"), f()]', '[{"name": "f", "results": {}}]',
                "They rise.")
    return [good, talk("Hi", "Hello."), talk("Hi", "[Market Trends API(kind=]"), talk("Hi", "[unknown(x=1)]"),
            {"system": "no tools", "conversations": good["conversations"]}, {"conversations": []}]


@pytest.fixture(params=["list", "lines"])
def toolace_file(request, tmp_path):
    entries = toolace_entries()
    text = json.dumps(entries) if request.param == "list" else "\n".join(map(json.dumps, entries))
    (tmp_path / "toolace.json").write_text(text)
    return tmp_path / "toolace.json"


def test_toolace_dialogues(toolace_file):
    dialogues, unreadable = toolace.read_toolace(toolace_file)
    assert (len(dialogues), unreadable) == (2, 4)
    assert [m["role"] for m in dialogues[0]] == ["system", "user", "assistant", "user", "assistant"]
    system, _, called, results, _ = [m["content"] for m in dialogues[0]]
    assert parse(called).calls == [("Market Trends API", {"kind": "INDEX"}), ("f", {})]
    assert results.startswith("<tool_response>\n[{") and '"type": "object"' in system
    in_b, _ = toolace.read_toolace(toolace_file, "B")
    assert in_b[0][0]["content"].startswith("You are given a question and a set of functions.")
    assert in_b[0][2]["content"] == "[Market Trends API(kind='INDEX'), f()]"
    assert in_b[1][2]["content"] == "Hello."


def test_toolace_dialogues_that_end_or_begin_oddly():
    """The last question has no answer to learn; two answers in a row, or none, are no dialogue."""
    entry = toolace_entries()[1]

    def read(*turns):
        conversations = [{"from": who, "value": value} for who, value in turns]
        return toolace.toolace_dialogue(entry | {"conversations": conversations}, "A")
    asked, said = ("user", "Hi"), ("assistant", "Hello.")
    assert len(read(asked, said, asked, said)) == 5 and read(asked, said, asked) == read(asked, said)
    for turns in ([], [asked], [said], [asked, asked, said], [asked, said, said], [said, asked]):
        assert read(*turns) is None
    assert read(asked, ("assistant", "<tool_call>")) is None         # a reply that is not clean


def test_toolace_names():
    names = ["Market API", "API"]                # one ends like the other; a name may stand inside a value
    assert toolace.toolace_calls("[API(a=1), Market API(b='x')]", names) == [("API", {"a": 1}),
                                                                             ("Market API", {"b": "x"})]
    for text in ("[API(a='API(')]", "[other(a=1)]", "[API(a=1)", "[API(1)]"):
        with pytest.raises(ValueError):
            toolace.toolace_calls(text, names)


def test_toolace_becomes_rows(toolace_file, tmp_path, chat):
    """The script's lines on stdout, the count on stderr; then --sft_file, token by token."""
    dialogues, _ = toolace.read_toolace(toolace_file)
    script = [sys.executable, str(ROOT / "results/toolace.py"), str(toolace_file)]
    done = subprocess.run([*script, "--syntax", "A"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "2 dialogues; left out: 4 that cannot be read" in done.stderr
    assert [json.loads(line)["messages"] for line in done.stdout.splitlines()] == dialogues
    path = tmp_path / "dialogues.jsonl"
    assert toolace.main([str(toolace_file), "--out", str(path)]) == 0 and path.read_text() == done.stdout
    flags = ["--signal", "sft", "--schedule", "sft", "--sft_file", str(path), "--max_total_tokens", "4000"]
    signal = supervision.SFT(train.parse_args(flags), chat, [], Limits(total_tokens=4000))
    row, _ = signal.rows()
    trained = chat.text([i for i, trained in zip(row.ids, row.mask) if trained])
    assert trained == dialogues[0][2]["content"] + "<|im_end|>They rise.<|im_end|>"
    whole = chat.tokenizer.apply_chat_template(dialogues[0], tokenize=False)     # no seams
    assert chat.text(row.ids) + "\n" == whole
    assert "2 dialogues" in signal.note and "left out: 0" in signal.note
    with pytest.raises(UserError, match="no usable row"):
        supervision.SFT(train.parse_args(flags), chat, [], Limits(total_tokens=10))


def test_toolace_mistakes(tmp_path, capsys):
    (tmp_path / "text").write_text("Trends?")
    for name, said in (("none.json", "No such file"), ("text:1", "Expecting value")):
        assert toolace.main([str(tmp_path / name.removesuffix(":1"))]) == 2
        seen = capsys.readouterr()
        assert f"{name} cannot be read: {said}" in seen.err and seen.err.count("\n") == 1 and not seen.out


GOOD = json.dumps(toolace_entries()[1])
DEEP = '[{"name": "f", "parameters": ' + '{"properties": {"a": ' * 400 + "{}" + "}}" * 400 + "}]"
BROKEN = [                                       # (content, the line that is named or "", what is said of it)
    (b"", "", "it is empty"),
    (b"\n \n", "", "it is empty"),
    (b"[]", "", "it is empty"),
    (b"null", "", "none of its 1 entries"),
    (b"17\n\"x\"\n[1]", "", "none of its 3 entries"),
    (b"[1, [2], \"x\", null, {}]", "", "none of its 5 entries"),
    (GOOD.encode("utf-16"), ":1", "it is not UTF-8"),
    (GOOD.encode("utf-16-le"), ":1", "Expecting property name"),
    ((GOOD + '\n{"system": "\xe9"}').encode("latin-1"), ":2", "it is not UTF-8"),
    ((GOOD + "\n" + GOOD[:-9]).encode(), ":2", "Unterminated string"),
    (f"[{GOOD},\n{GOOD},".encode(), ":2", "Expecting value"),
    (b"[" * 100_000, ":1", "maximum recursion depth"),
    ((GOOD + '\n{"system": ' + "[" * 100_000).encode(), ":2", "maximum recursion depth"),
    ((GOOD + '\n{"system": ' + "9" * 5000 + "}").encode(), ":2", "4300 digits"),
    ((GOOD + "\n" + GOOD + GOOD).encode(), ":2", "Extra data"),
    (GOOD.replace("Hello.", "\\ud800").encode(), "", "none of its 1 entries"),
    (json.dumps({"system": DEEP, "conversations": []}).encode(), "", "none of its 1 entries"),
    (GOOD.replace('"Hello."', "5").encode(), "", "none of its 1 entries"),
    (GOOD.replace('"Hi"', '["Hi"]').encode(), "", "none of its 1 entries"),
    (GOOD.replace('"conversations": [', '"conversations": [7, ').encode(), "", "none of its 1 entries"),
]


@pytest.mark.parametrize("k", range(len(BROKEN)))
def test_toolace_broken_files(k, tmp_path, capsys):
    """One sentence with file and line, status 2, and nothing written"""
    content, line, said = BROKEN[k]
    path, out = tmp_path / "t.json", tmp_path / "out.jsonl"
    path.write_bytes(content)
    start = time.perf_counter()
    assert toolace.main([str(path), "--out", str(out)]) == 2
    seen = capsys.readouterr()
    assert f"toolace.py: error: {path}{line} cannot be read: " in seen.err and said in seen.err
    assert seen.err.count("\n") == 1 and not seen.out and not out.exists() and time.perf_counter() - start < 5


def test_toolace_reads_what_is_sound(tmp_path, capsys):
    """A mark at the beginning, Windows' line ends, empty lines; and --out that cannot be written"""
    path = tmp_path / "t.json"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n{GOOD}\r\n".encode())
    dialogues, unreadable = toolace.read_toolace(path)
    assert (len(dialogues), unreadable) == (2, 0)
    assert toolace.main([str(path), "--out", str(tmp_path / "no/such/folder")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_training_on_dialogues(toolace_file, folder, tmp_path):
    """A run on a file: its rows are trained, none of the world's."""
    path = tmp_path / "dialogues.jsonl"
    assert toolace.main([str(toolace_file), "--out", str(path)]) == 0
    out = tmp_path / "run"
    assert train.cli(["--signal", "sft", "--schedule", "sft", "--sft_epochs", "3", "--sft_file", str(path),
                      "--sft_batch", "4", "--eval_tasks", "1", "--train_tasks", "3",
                      "--max_total_tokens", "4000", "--eval_every", "-1", "--probe_every", "-1",
                      "--out", str(out)]) == 0
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in steps if "phase" in r]
    assert [(r["sft_rows"], r["sft_visits"], r["sft_updates"]) for r in steps] == [(2, 6, 3)]
    assert steps[0]["sft_loss_last"] < steps[0]["sft_loss_first"]
