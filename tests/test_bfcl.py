"""The real-data world: BFCL's tasks and simulators, ACEBench's entries, ToolACE's dialogues.

The BFCL tests need its package (pip install --no-deps bfcl-eval==2026.3.23 mpmath==1.3.0); the test on ACEBench's own data
needs its folder in the environment variable ACEBENCH_DIR. Without them they are skipped."""
import copy
import decimal
import hashlib
import importlib.util
import json
import os
import pickle
import sys
import threading
import time

import pytest

import supervision
import tools
import train
from rollout import Chat, Limits, play
from supervision import cause, demonstrate, hint, reflect_error, reflect_whole, reflection_prompts
from tools import (CATEGORIES, Env, UserError, ace_equal, acebench_tasks, bfcl_split, bfcl_tasks, coerce, demonstration,
                   make_env, parse, read_toolace, verdicts, write_calls)

needs_bfcl = pytest.mark.skipif(not (importlib.util.find_spec("bfcl_eval") and importlib.util.find_spec("mpmath")),
                                reason=f"pip install --no-deps {tools.BFCL_PACKAGES}")
TAG = "<tool_call>\n{}\n</tool_call>"


def story(category, index):
    return tools._bfcl_category(category)[index]


def said(script, syntax="A"):
    """[["<tool_call>...", "Done."], ...] -> [Message, ...]"""
    return [parse(text, syntax) for turn in script for text in turn]


def one(name, **args):
    return parse(write_calls([(name, args)]))


def with_apps(*apps, init=None, padded=False):
    """An Env of one turn that can call every tool of `apps`."""
    docs = {name: "" for name, (app, _) in tools.bfcl()[2].items() if app in apps}
    return Env(tools.BfclTask("t", "base", docs, list(apps), init or {}, [tools.Turn("?", [], "")], padded))


def result(env, name, **args):
    return env.step(one(name, **args)).removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")


# ---- ground truth ------------------------------------------------------------------------------------------------------


@needs_bfcl
def test_ground_truth_passes():
    """Both verdicts on all 800, in both syntaxes; and what the simulators answer, byte by byte."""
    failed, digest = [], hashlib.sha256()
    data = tools.bfcl()[0] / "possible_answer"
    for category in CATEGORIES:
        truths = tools.read_json_lines(data / f"BFCL_v4_multi_turn_{category}.json")
        for index, truth in enumerate(truths):
            task = story(category, index)
            both = verdicts(task, "AB"[index % 2], said(demonstration(task, "AB"[index % 2]), "AB"[index % 2]))
            failed += [(task.id, name) for name, reward in both.items() if reward != 1]
            apps = task.fresh_apps()
            for texts, turn in zip(truth["ground_truth"], task.turns, strict=True):
                for text, (name, args) in zip(texts, turn.calls, strict=True):
                    answer = tools.run_tool(getattr(apps[tools.bfcl()[2][name][0]], name), copy.deepcopy(args))
                    digest.update(f"{task.id}|{text}|{answer}\n".encode())
    assert failed == [("multi_turn_miss_func_49", "_strict")]    # it needs its withheld tool before the reveal
    assert digest.hexdigest() == "af4e196a8ef4951c6f174bcc724ecf12eb54e9692c92e3d2caf5a49431ad091f"


def spoil(task):
    """-> {what: script}: ways to be wrong, and ways to be right that look odd"""
    right = demonstration(task)
    full = [t for t, turn in enumerate(task.turns) if turn.calls]
    last, empty = full[-1], [t for t, turn in enumerate(task.turns) if not turn.calls]

    def changed(t, messages):
        return [messages if i == t else turn for i, turn in enumerate(right)]
    junk = TAG.format('{"name": "junk", "arguments": {}}')
    ways = {"right": right, "nothing": [["Done."] for _ in right],
            "last call dropped": changed(last, right[last][:-2] + ["Done."]),
            "last call is junk": changed(last, right[last][:-2] + [junk, "Done."]),
            "doubled": [[m for text in turn[:-1] for m in (text, text)] + turn[-1:] for turn in right],
            "reversed": [turn[:-1][::-1] + turn[-1:] for turn in right],
            "all at once": [sum((turn[:-1] for turn in right), []) + ["Done."], *[["Done."] for _ in right[1:]]],
            "with junk": [turn[:-1] + [junk] + turn[-1:] if turn[:-1] else turn for turn in right]}
    if empty:
        ways["call where none is right"] = changed(empty[0], right[full[0]][:1] + ["Done."])
    return ways


@needs_bfcl
@pytest.mark.parametrize("category", CATEGORIES)
def test_verdict_is_the_official_one(category):
    """The package's own checker on the same conversations; its objects live on, so every model name is used once."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker
    entries = tools.read_json_lines(tools.bfcl()[0] / f"BFCL_v4_multi_turn_{category}.json")
    truths = tools.read_json_lines(tools.bfcl()[0] / "possible_answer" / f"BFCL_v4_multi_turn_{category}.json")
    seen = set()
    for index in range(category == "long_context", 200, 9):
        task = story(category, index)
        for i, (way, script) in enumerate(spoil(task).items()):
            decoded = [[[f"{name}({', '.join(f'{k}={v!r}' for k, v in args.items())})" for name, args in parse(text).calls]
                        for text in turn[:-1]] for turn in script]
            name = f"test_{category}_{i}"
            official = multi_turn_checker(decoded, truths[index]["ground_truth"], entries[index], category, name)
            assert verdicts(task, "A", said(script))[""] == official["valid"], (task.id, way)
            seen.add((way, official["valid"]))
    assert {("right", True), ("nothing", False), ("last call dropped", False), ("doubled", False), ("with junk", True)} <= seen
    assert category not in ("miss_func", "miss_param") or ("call where none is right", True) in seen


@needs_bfcl
def test_strict_verdict():
    for index in range(0, 60, 7):                    # calls where none is right: forgiven by one verdict only
        for category in ("miss_func", "miss_param"):
            task = story(category, index)
            script = demonstration(task)
            empty = next(t for t, turn in enumerate(task.turns) if not turn.calls)
            visible = next((m for turn in script for m in turn[:-1] if parse(m).calls[0][0] in task.docs), None)
            if visible is None:
                continue
            script[empty] = [visible, "no"]
            assert verdicts(task, "A", said(script))["_strict"] == 0
    task = story("base", 0)
    script = demonstration(task)
    script[0][-1] = "<tool_call>"
    assert verdicts(task, "A", said(script)) == {"": 1, "_strict": 0}


@needs_bfcl
def test_withheld_tool_is_not_callable_before_its_reveal():
    for task in tools._bfcl_category("miss_func")[:40]:
        k = next(t for t, turn in enumerate(task.turns) if turn.reveal)
        env = Env(task)
        for turn in demonstration(task)[:k]:
            answers = [env.step(parse(text)) for text in turn]
        assert all(json.loads(line)["function"]["name"] in task.turns[k].reveal for line in answers[-1].splitlines()[:-1])
        for name in task.turns[k].reveal:
            assert name not in task.system("A") + task.system("B") or f'"name": "{name}"' not in task.system("A")
            assert "there is no tool" in result(Env(task), name)
            assert "there is no tool" not in result(env, name)


# ---- format ------------------------------------------------------------------------------------------------------------


@needs_bfcl
def test_system_message_is_what_qwen_was_trained_on():
    system = story("base", 0).system("A")
    head, rest = system.split("<tools>\n")
    docs, tail = rest.split("\n</tools>")
    assert head.startswith("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\nYou may call")
    assert tail.endswith('<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')
    kinds = set()

    def walk(schema):
        kinds.add(schema["type"])
        for child in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
            walk(child)
    for _, doc in tools.bfcl()[2].values():
        assert set(doc["function"]) == {"name", "description", "parameters"}
        walk(doc["function"]["parameters"])
    assert kinds == {"object", "string", "number", "integer", "array", "boolean"} and len(tools.bfcl()[2]) == 128
    assert [json.loads(line) for line in docs.splitlines()] == [d for a, d in tools.bfcl()[2].values()
                                                               if a in ("TwitterAPI", "GorillaFileSystem")]


def test_coerce():
    schema = {"properties": {"a": {"type": "number"}, "n": {"type": "integer"},
                             "xs": {"type": "array", "items": {"type": "number"}}}}
    got = coerce({"a": 5, "n": 2.0, "xs": [1, 2.5], "b": 7}, schema)
    assert json.dumps(got) == '{"a": 5.0, "n": 2, "xs": [1.0, 2.5], "b": 7}'
    assert json.dumps(coerce({"a": True, "n": "x", "xs": "y"}, schema)) == '{"a": true, "n": "x", "xs": "y"}'


@needs_bfcl
def test_numbers_may_be_written_either_way():
    for index in range(0, 200, 5):
        task = story("base", index)
        for change in (lambda v: float(v) if type(v) is int else v,
                       lambda v: int(v) if type(v) is float and v.is_integer() else v):
            script = [[write_calls([(n, {k: change(v) for k, v in args.items()})]) for n, args in turn.calls] + ["Done."]
                      for turn in task.turns]
            assert verdicts(task, "A", said(script)) == {"": 1, "_strict": 1}, task.id


@needs_bfcl
def test_splits_are_disjoint_by_story():
    parts = [bfcl_split(s) for s in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [80, 20, 100] and sorted(sum(parts, [])) == list(range(200))
    half = json.dumps(sorted(parts[0] + parts[1])).encode()
    assert hashlib.sha256(half).hexdigest().startswith("efaae354797fa5de")       # the paper's training half
    assert len(bfcl_split("train", 5)) == 95 and bfcl_split("test", 5) == parts[2]
    numbers = [{t.id.rsplit("_", 1)[1] for c in CATEGORIES if c != "long_context" or s == "test" for t in bfcl_tasks(s, c)}
               for s in ("train", "validation", "test")]
    assert not numbers[0] & numbers[1] and not (numbers[0] | numbers[1]) & numbers[2]
    with pytest.raises(AssertionError):
        bfcl_tasks("train", "long_context")


# ---- hostile calls -----------------------------------------------------------------------------------------------------


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
    for name, args in [(payload, {}), ("__init__", {}), ("_load_scenario", {"scenario": {}}), ("root", {}), ("globals", {}),
                       ("os.system", {"command": payload}), ("ls", {payload: 1}), ("ls", {"self": 1}), ("ls", {"a": 1, "b": 2}),
                       ("cat", {}), ("cat", {"file_name": []}), ("cat", {"file_name": {"a": 1}}), ("mkdir", {"dir_name": deep}),
                       ("tail", {"file_name": "x", "lines": 1e999}), ("mean", {"numbers": [1]}), ("", {}), ("no\0name", {}),
                       ("cat", {"file_name": payload}), ("grep", {"file_name": None, "pattern": payload})]:
        for syntax in "AB":
            text = write_calls([(name, args)], syntax)
            message = parse(text, syntax)
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
            for name, args in [("mkdir", {"dir_name": f"d{i + 1}"}), ("cp", {"source": f"d{i}", "destination": "x"}),
                               ("mv", {"source": "x", "destination": f"d{i + 1}"}),
                               ("cp", {"source": f"d{i}", "destination": f"d{i + 1}"})]:
                assert '"error"' not in result(env, name, **args)

    def all_of_them(times, answers):
        env = with_apps("GorillaFileSystem", "MathAPI")
        double(env, 40)
        for name, args in [("find", {}), ("du", {}), ("square_root", {"number": 2, "precision": 200_000_000}),
                           ("power", {"base": 7, "exponent": 50_000_000}), ("power", {"base": "7", "exponent": 2}),
                           ("logarithm", {"value": 10, "base": 2, "precision": 1_000_000}),
                           ("logarithm", {"value": "1e999999999999", "base": 2, "precision": 10}),
                           ("round_number", {"number": 1.5, "decimal_places": 10 ** 9}),
                           ("multiply", {"a": 10 ** 4000, "b": 10 ** 4000})]:
            start = time.perf_counter()
            answers.append((name, result(env, name, **args)))
            times.append(time.perf_counter() - start)
    times, answers = [], []
    thread = threading.Thread(target=all_of_them, args=(times, answers), daemon=True)   # signals never reach this thread
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and len(answers) == 9, "a call hangs"
    assert all("rror" in text for _, text in answers), answers
    assert "takes too long" in answers[0][1] and max(times) < 5


@needs_bfcl
def test_directories_that_contain_themselves():
    env = with_apps("GorillaFileSystem")
    result(env, "mkdir", dir_name="d")
    result(env, "cp", source="d", destination="d")
    for name in ("find", "du", "pwd", "ls"):
        result(env, name)
    copy.deepcopy(env)
    env.step(parse("Done."))
    assert env.status == "finished"


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
    env.step(tools.Message("", "call", call))
    result(env, "mention", tweet_id=1, mentioned_usernames=["@leak"])
    assert args == ["@a"]                            # what the caller holds (a task's ground truth!) is never changed

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

    env = Env(story("base", 0))                      # a branch and a stored copy go their own way
    branch, stored = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    for text in demonstration(env.task)[0][:-1]:
        env.step(parse(text))
    assert env.task.state(env.apps["GorillaFileSystem"]) != env.task.state(branch.apps["GorillaFileSystem"])
    assert env.task.state(stored.apps["GorillaFileSystem"]) == env.task.state(branch.apps["GorillaFileSystem"])


@needs_bfcl
def test_concurrent_episodes_of_one_task():
    """8 threads, one task each time: the entries whose tools share numeric precision, and two ordinary ones."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for index in 3 * (32, 49, 57, 59) + (0, 150):
            task, logs = story("base", index), []

            def run():
                env = Env(task)
                log = [env.step(message) for message in said(demonstration(task))]
                logs.append((log, env.grade().reward))
            threads = [threading.Thread(target=run) for _ in range(8)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            assert len(logs) == 8 and all(log == logs[0] for log in logs) and logs[0][1] == 1
    finally:
        sys.setswitchinterval(interval)


# ---- supervision and training ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder with a random Qwen2 whose tokenizer knows the words of BFCL's system messages: prompts of 2 to 4 thousand tokens
    instead of one per byte. -> (folder, Chat)"""
    words = supervision.WORDING
    supervision.WORDING += "\n".join(t.system(s) for t in tools._bfcl_category("base")[::10] for s in "AB")
    tokenizer = supervision.tiny_tokenizer()
    supervision.WORDING = words
    folder = tmp_path_factory.mktemp("model")
    a = train.parse_args(["--tiny_hidden", "32", "--tiny_layers", "1"])
    supervision.tiny_model(len(tokenizer), a).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, Chat(tokenizer)


@needs_bfcl
def test_supervision_on_real_tasks(small_model):
    chat = small_model[1]
    a = train.parse_args(["--world", "bfcl", "--model", "x"])
    limits = Limits(a.max_messages, a.max_message_tokens, a.max_total_tokens, a.max_observation_tokens)
    for category in ("base", "miss_func", "miss_param"):
        for task in bfcl_tasks("train", category, 4):
            episode = demonstrate(chat, task, a, limits)
            assert episode.states.count("reply") == len(task.turns) and set(episode.states) == {"call", "reply"}
            for turn in task.turns:
                assert write_calls(turn.calls) in hint(task, "A") if turn.calls else "no call is right" in hint(task, "A")
            wrong = play(chat, Env(task), [["Done."] for _ in task.turns], limits)
            first = next(t for t, turn in enumerate(task.turns) if turn.calls)
            assert (wrong.reward, wrong.failed_turn) == (0, first)
            assert cause(task, wrong, first, "A") == "no call where one is right" and cause(task, episode, first, "A") is None
            assert [kind for kind, _ in reflection_prompts(task, wrong, "A")] == ["whole", "error"]
            assert write_calls(task.turns[first].calls) in reflect_whole(task, wrong, "A")
            assert reflect_error(task, wrong, "A").startswith("cause: no call where one is right\nfix: <tool_call>")


RUN = ["--world", "bfcl", "--threads", "1", "--prompts", "1", "--group", "2", "--updates", "1", "--eval_tasks", "1",
       "--train_tasks", "3", "--probe_tasks", "1", "--max_messages", "12", "--max_message_tokens", "200", "--sft_batch", "2",
       "--max_total_tokens", "12000", "--max_observation_tokens", "64", "--kl_weight", "0", "--eval_every", "-1"]


@needs_bfcl
def test_train_and_evaluate_end_to_end(small_model, ace_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = [*RUN, "--model", str(small_model[0]), "--acebench", str(ace_folder)]
    assert train.cli([*run, "--signal", "prs", "--schedule", "synchronous", "--steps", "1", "--out", "r"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    evals, tests = [r for r in rows if "eval/average" in r], [r for r in rows if "test/average" in r]
    assert [r["step"] for r in evals] == [0, 1] and [r["step"] for r in tests] == [1]     # test tasks: once, at the end
    assert {"eval/base", "eval/base_strict", "eval/average_strict", "eval/format_ood"} <= set(evals[0])
    assert "eval/long_context" not in evals[0] and "eval/ace_tags" not in evals[0]
    assert {"test/long_context", "test/long_context_strict", "test/ace_tags", "test/ace_brackets"} <= set(tests[0])
    trained = next(r for r in rows if r.get("phase") == "rl+sft")
    assert trained["sft_loss"] > 0 and trained["skipped_updates"] == 0
    assert train.cli([*run, "--model", "r", "--eval_only", "--out", "e"]) == 0
    scores = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert {"long_context", "base_strict", "ace_tags", "ace_brackets", "average"} <= set(scores)
    capsys.readouterr()


def test_mistakes_are_one_sentence(monkeypatch, capsys):
    for name in ("bfcl_eval", "bfcl_eval.constants.executable_backend_config"):
        monkeypatch.setitem(sys.modules, name, None)
    tools.bfcl.cache_clear()
    tools._bfcl_category.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps bfcl-eval==2026.3.23 mpmath==1.3.0"):
        bfcl_tasks("train", "base")
    for argv, word in ((["--world", "bfcl"], "--model"), (["--acebench", "x"], "--world bfcl"),
                       (["--sft_file", "x"], "--signal sft"), (["--validation", "100"], "--validation 100")):
        with pytest.raises(SystemExit):
            train.parse_args(argv)
        assert word in capsys.readouterr().err


# ---- ACEBench ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ace_folder(tmp_path_factory):
    """ACEBench's layout, two entries made by hand."""
    folder = tmp_path_factory.mktemp("ace")
    (folder / "possible_answer").mkdir()
    docs = [{"name": "weather", "description": "Weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}]
    entries = [{"id": "a_0", "question": "user: Weather in New York for 3 days?\n", "function": docs, "time": "It is Monday."},
               {"id": "a_1", "question": "user: Weather in Rome and Oslo?\n", "function": docs, "time": ""}]
    truths = [{"id": "a_0", "ground_truth": [{"weather": {"city": "New York", "days": 3}}, {"weather": {"city": "NYC"}}]},
              {"id": "a_1", "ground_truth": {"weather_1": {"city": "Rome"}, "weather_2": {"city": "Oslo"}}}]
    for name, rows in (("data_normal_x.json", entries), ("possible_answer/data_normal_x.json", truths)):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_acebench_rules(ace_folder):
    first, second = acebench_tasks(ace_folder)
    assert "It is Monday." in first.system("B") and first.turns[0].user.endswith("New York for 3 days?\n")

    def grade(task, calls, syntax):
        env = make_env(task, syntax, "strict")
        assert env.step(parse(calls if isinstance(calls, str) else write_calls(calls, syntax), syntax)) is None
        return env.grade().reward, env.status
    for syntax in "AB":
        for calls, reward in [([("weather", {"city": "the city of new-york", "days": 3})], 1),
                              ([("weather", {"city": "New York"})], 1),
                              ([("weather", {"city": "N.Y.C."})], 1), ([("weather", {"city": "New York", "days": 4})], 0),
                              ([("weather", {"days": 3})], 0), ([("weather", {"city": "New York", "unit": "C"})], 0),
                              ([("Weather", {"city": "New York"})], 0), ([("weather", {"city": "New York"})] * 2, 0),
                              ("I cannot.", 0), ("", 0), ("<tool_call>", 0)]:
            assert grade(first, calls, syntax) == (reward, "finished"), (calls, syntax)
        assert grade(second, [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})], syntax)[0] == 1
        assert grade(second, [("weather", {"city": "Oslo"}), ("weather", {"city": "Oslo"})], syntax)[0] == 0
    assert ace_equal({"a": ["X y"], "b": True}, {"a": ["xy"], "b": True}) and not ace_equal({"a": ["X yz"]}, {"a": ["xy"]})
    with pytest.raises(UserError, match="data_normal"):
        acebench_tasks(ace_folder / "possible_answer" / "none")


@pytest.mark.skipif("ACEBENCH_DIR" not in os.environ, reason="ACEBENCH_DIR does not name ACEBench's English data")
def test_acebench_ground_truth():
    tasks = acebench_tasks(os.environ["ACEBENCH_DIR"])
    assert len(tasks) == 823
    for syntax in "AB":
        for task in tasks:
            env, idle = make_env(task, syntax, "lenient"), make_env(task, syntax, "lenient")
            env.step(parse(write_calls(task.turns[0].calls, syntax), syntax))
            idle.step(parse("I cannot do that.", syntax))
            assert (env.grade().reward, idle.grade().reward) == (1, 0), task.id


# ---- ToolACE -----------------------------------------------------------------------------------------------------------


def toolace_rows():
    system = ('Here is a list of functions in JSON format that you can invoke:\n'
              '[{"name": "Market Trends API", "description": "Trends.", "parameters": {"type": "dict", "properties": '
              '{"kind": {"type": "string"}}, "required": ["kind"]}}, '
              '{"name": "f", "description": "", "parameters": {"type": "dict", "properties": {}}}]. '
              "\nShould you decide to return the function call(s), put them as [func(a=1)]")
    talk = lambda *values: {"system": system, "conversations": [
        {"from": who, "value": value} for who, value in zip(("user", "assistant", "tool", "assistant"), values)]}
    good = talk("Trends?", '[Market Trends API(kind="INDEX"), f()]', '[{"name": "f", "results": {}}]', "They rise.")
    return [good, talk("Hi", "Hello."), talk("Hi", "[Market Trends API(kind=]"), talk("Hi", "[unknown(x=1)]"),
            {"system": "no tools", "conversations": good["conversations"]}, {"conversations": []}]


@pytest.mark.parametrize("lines", [False, True])
def test_toolace(tmp_path, chat, lines):
    path, rows = tmp_path / "toolace.json", toolace_rows()
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    dialogues, unreadable = read_toolace(path)
    assert (len(dialogues), unreadable) == (2, 4)
    assert [m["role"] for m in dialogues[0]] == ["system", "user", "assistant", "user", "assistant"]
    assert parse(dialogues[0][2]["content"]).calls == [("Market Trends API", {"kind": "INDEX"}), ("f", {})]
    assert dialogues[0][3]["content"].startswith("<tool_response>\n[{") and '"type": "object"' in dialogues[0][0]["content"]
    assert read_toolace(path, "B")[0][1][2]["content"] == "Hello."

    flags = ["--signal", "sft", "--schedule", "sft", "--sft_file", str(path), "--max_total_tokens", "4000"]
    signal = supervision.SFT(train.parse_args(flags), chat, [], Limits(total=4000))
    row = signal.rows()[0]
    trained = chat.text([i for i, m in zip(row.ids, row.mask) if m])
    assert trained == dialogues[0][2]["content"] + "<|im_end|>They rise.<|im_end|>"
    assert chat.text(row.ids) + "\n" == chat.tokenizer.apply_chat_template(dialogues[0], tokenize=False)      # no seams
    assert "2 dialogues; left out: 4 that cannot be read, 0 longer" in signal.note
    with pytest.raises(UserError, match="no usable row"):
        supervision.SFT(train.parse_args(flags), chat, [], Limits(total=10))
    with pytest.raises(UserError, match="cannot be read"):
        read_toolace(tmp_path / "none.json")
