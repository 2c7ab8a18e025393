"""The world: tasks, what a message is, grading."""
import copy
import pickle
import random

import pytest
from conftest import ROOT
from make_base import noisy_script
from renamed import renamed
from robustness import rewards

from rollout import STATES, Limits, Message, is_clean, parse, play, truth_script, write_calls
from tools import CATEGORIES, DOCS, HELD_OUT, WORDS, Env, Task, Turn, make_tasks

CALL = '<tool_call>\n{"name": "read_file", "arguments": {"name": "plan"}}\n</tool_call>'


def run(env, script):
    """Play message texts; the episode must end with the last one or go on."""
    answers = []
    for text in script:
        answers.append(env.step(parse(text, env.syntax)))
    return answers


def two_turns(first_calls=True):
    """A literal task: turn 1 pays bob (or, with first_calls=False, nothing is right), turn 2 asks for the
    balance."""
    pay = [("pay_money", {"to": "bob", "amount": 5})] if first_calls else []
    turns = [Turn('pay "bob" 5 coins', pay, "Done."),
             Turn("check the balance", [("check_balance", {})], "It is.")]
    return Task("t", "base", dict(DOCS["bank"]), ["bank"], "seed", turns)


PAY = write_calls([("pay_money", {"to": "bob", "amount": 5})])
CHECK = write_calls([("check_balance", {})])
OTHER = write_calls([("check_nothing", {})])
READ = ("read_file", {"name": "plan"})
BAD_JSON = "Error: the call is not valid JSON"
BAD_CALL = 'Error: a call needs "name" and "arguments"'


@pytest.mark.parametrize("text, state, calls", [
    (CALL, "call", [READ]),
    ("I will look.\n" + CALL, "call", [READ]),
    (CALL + "\n" + CALL, "call", [READ] * 2),
    (CALL + "\nDone.", "polluted", [READ]),                          # text after the call
    (CALL + "\n<tool_call>", "polluted", [READ]),                    # dangling tag after the call
    ("<tool_call>\n" + CALL, "polluted", [BAD_JSON]),                # the first open tag counts
    ("Done.", "reply", []),
    ("Done.\n<tool_call>", "polluted", []),
    ("Done.<|im_start|>", "polluted", []),
    ("<|endoftext|>", "polluted", []),
    ('{"name": "read_file", "arguments": {"name": "plan"}}', "polluted", []),    # a call without its tags
    ("[read_file(name='plan')]", "polluted", []),                    # the other syntax
    ("<tool_call>", "collapsed", []),
    ("<tool_call>\n<tool_call>\n", "collapsed", []),
    ("<tool_call>\n</tool_call>", "polluted", [BAD_JSON]),
    ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "polluted", [BAD_CALL]),
    ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "polluted", [BAD_JSON]),
    ("", "empty", []),
    (" \n", "empty", []),
])
def test_parse_tags(text, state, calls):
    message = parse(text)
    assert (message.text, message.state, message.calls) == (text, state, calls)


@pytest.mark.parametrize("text, state, calls", [
    ("[read_file(name='plan'), check_balance()]", "call", [READ, ("check_balance", {})]),
    ("[pay_money(to='bob', amount=5)]", "call", [("pay_money", {"to": "bob", "amount": 5})]),
    ("Done.", "reply", []),
    ("[read_file('plan')]", "polluted", []),                         # positional arguments name nothing
    ("[read_file(name=__import__('os'))]", "polluted", []),
    ("[read_file(name='plan')", "polluted", []),
    ("[os.system(a='x')]", "polluted", []),
    ("[]", "polluted", []),
    (CALL, "polluted", []),
    ("[", "collapsed", []),
    ("<tool_call>", "collapsed", []),
    ("", "empty", []),
])
def test_parse_brackets(text, state, calls):
    message = parse(text, "B")
    assert (message.text, message.state, message.calls) == (text, state, calls)


def test_parse_cut():
    assert parse("Done", ended=False).state == "cut"
    assert parse(CALL, ended=False).state == "cut"
    assert parse("", ended=False).state == "cut"


def test_parse_never_raises():
    """Whatever the text. Deep nesting breaks recursive parsers, thousands of digits break int()."""
    rng = random.Random(0)
    pieces = ["<tool_call>", "</tool_call>", "<|im_end|>", "{", "}", "[", "]", '"name": ', '"', "f", "(", ")",
              "=", "'", "\n", "\0", '{"name": "f", "arguments": {}}', "9" * 30, ",", "\\u", "\ud800"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(3000)]
    texts += ["[" * 19_000, "[f(x=" + "(" * 5000, "<tool_call>" + "[" * 100_000 + "</tool_call>",
              "-" * 19_999, "[f(x=" + "9" * 9000 + ")]", "<tool_call>" * 20_000,
              '<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 9000 + "}}</tool_call>"]
    for text in texts:
        for syntax in "AB":
            assert parse(text, syntax).state in STATES


def test_write_then_parse():
    calls = [("f", {"a": 'x "quoted"', "n": 3}), ("g", {})]
    for syntax in "AB":
        assert parse(write_calls(calls, syntax), syntax).calls == calls
    assert write_calls(calls, "B") == "[f(a='x \"quoted\"', n=3), g()]"
    assert write_calls(calls[1:]) == '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'


def test_is_clean():
    assert is_clean([]) and is_clean(["call", "reply", "call"])
    for state in ("polluted", "collapsed", "empty", "cut"):
        assert not is_clean(["call", state])


def test_ground_truth_passes_everywhere():
    for category in CATEGORIES:
        for held_out in (False, True):
            for task in make_tasks("test", category, 60, held_out=held_out):
                assert 1 <= len(task.turns) <= 4
                for syntax in "AB":
                    for closing in ("lenient", "strict"):
                        env = task.env(syntax, closing)
                        for texts in truth_script(task, syntax):
                            run(env, texts)
                        assert env.grade() == 1 and env.status == "finished" and env.failed_turn is None


def test_truth_script():
    """One call per message, then the reply: what the demonstrations say, turn by turn."""
    assert truth_script(two_turns()) == [[PAY, "Done."], [CHECK, "It is."]]
    assert truth_script(two_turns(first_calls=False), "B") == [["Done."], ["[check_balance()]", "It is."]]
    two_calls = Task("t", "base", dict(DOCS["bank"]), ["bank"], "seed", [
        Turn("do both", [("pay_money", {"to": "bob", "amount": 5}), ("check_balance", {})], "It is.")])
    assert truth_script(two_calls) == [[PAY, CHECK, "It is."]]


def test_tasks_are_deterministic_and_disjoint():
    said = lambda tasks: {" / ".join([turn.user for turn in task.turns]) for task in tasks}
    for category in CATEGORIES:
        train, test = make_tasks("train", category, 300, seed=3), make_tasks("test", category, 300)
        assert not said(train) & said(test)
        assert make_tasks("test", category, 300) == test and make_tasks("test", category, 20) == test[:20]
    assert said(make_tasks("test", "long_context", 50)) == said(make_tasks("test", "base", 50))


def test_held_out_app_never_appears_in_training():
    for category in CATEGORIES:
        for task in make_tasks("train", category, 300):
            assert HELD_OUT not in task.apps and not set(task.docs) & set(DOCS[HELD_OUT])


def test_categories():
    for task in make_tasks("test", "miss_func", 50):
        k = next(i for i, turn in enumerate(task.turns) if turn.reveal)
        assert task.turns[k - 1].calls == [] and set(task.turns[k].reveal).isdisjoint(task.docs)
        call = parse(write_calls(task.turns[k].calls))
        assert "there is no tool" in Env(task).step(call)            # the withheld tool does not exist yet
        task.early = task.turns[k].reveal        # a world whose withheld tools answer all the same
        for closing, failed_turn in (("lenient", None), ("strict", 0)):
            env = Env(task, closing=closing)
            assert "there is no tool" not in env.step(call) and env.failed_turn == failed_turn
    for task in make_tasks("test", "miss_param", 50):
        assert sum(not turn.calls for turn in task.turns) == 1
    padded, plain = make_tasks("test", "long_context", 1)[0], make_tasks("test", "base", 1)[0]
    call = parse(write_calls(plain.turns[0].calls))
    assert len(Env(padded).step(call)) > 5 * len(Env(plain).step(call))


def test_grading():
    def grade(script, closing="lenient", **kw):
        env = Env(two_turns(**kw), closing=closing)
        run(env, script)
        return env.grade(), env.failed_turn, env.status
    assert grade([PAY, "Done.", CHECK, "ok"]) == (1, None, "finished")
    assert grade([PAY, PAY, "Done.", CHECK, "ok"]) == (0, 0, "finished")         # wrong state
    assert grade([CHECK, PAY, "Done.", "ok"]) == (0, 1, "finished")              # no call in turn 2
    assert grade([PAY, "Done.", PAY, "ok"]) == (0, 1, "finished")
    assert grade([PAY, "Done.", OTHER, "ok"]) == (0, 1, "finished")              # the result is missing
    assert grade([PAY, CHECK, "Done.", OTHER, "ok"]) == (1, None, "finished")    # it came in an earlier turn
    assert grade(["", ""]) == (0, 0, "finished")
    assert grade([PAY, "Done.", CHECK]) == (0, None, None)                       # never closed
    # extra read-only calls are free; several calls may share a message
    assert grade([PAY + "\n" + CHECK, "Done.", CHECK, "ok"]) == (1, None, "finished")


def test_closing_rule_is_the_only_difference():
    """Lenient: a dangling open tag is worth as much as a reply. Strict: it fails. This is the loophole under
    study."""
    for bad in ("<tool_call>", "", "Done.\n<tool_call>"):
        lenient, strict = Env(two_turns()), Env(two_turns(), closing="strict")
        run(lenient, [PAY, bad, CHECK, bad])
        assert lenient.grade() == 1
        run(strict, [PAY, bad])
        assert (strict.status, strict.grade(), strict.failed_turn) == ("format_error", 0, 0)
    # a call where none is right
    for closing, reward in (("lenient", 1), ("strict", 0)):
        env = Env(two_turns(first_calls=False), closing=closing)
        run(env, [CHECK, "no", CHECK, "ok"])
        assert env.grade() == reward


def test_state_persists_and_branches():
    env = Env(two_turns())
    before = env.apps["bank"].balance
    run(env, [PAY])
    branch, stored = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    run(env, ["Done."])
    assert env.apps["bank"].balance == before - 5        # not reset between user turns
    for other in (branch, stored):
        assert other.turn == 0
        run(other, ["Done.", CHECK, "ok"])
        assert other.grade() == 1


def test_hostile_calls_are_observations():
    env = Env(two_turns())
    for name, args in [("__init__", {"rng": 0}), ("balance", {}), ("pay_money", {}),
                       ("pay_money", {"to": [], "amount": "x"}), ("pay_money", {"to": {}, "amount": 1e999}),
                       ("nothing", {}), READ]:
        assert "\nError: " in env.step(parse(write_calls([(name, args)])))
    assert vars(env.apps["bank"]) == vars(env.truth["bank"])


def test_errors_that_cannot_be_written_are_observations():
    """KeyError: an integer of 6,021 digits, which Python refuses to write"""
    env = Env(Task("t", "base", dict(DOCS["shop"]), ["shop"], "seed", [Turn("?", [], "")]))
    for name in ("count_item", "remove_item"):
        answer = env.step(Message("", "call", [(name, {"name": 16 ** 5000})]))
        assert answer == "<tool_response>\nError: the arguments cannot be written\n</tool_response>"
    assert env.turn_calls == 2 and not env.results


def test_a_long_answer_is_cut_before_it_is_encoded(chat, monkeypatch):
    """64 characters per token that is kept: none of the vocabularies' ordinary tokens is longer."""
    words = " ".join(f"{a} {b}" for a in WORDS for b in WORDS) + " "
    encoded, encode = [], chat._encode
    monkeypatch.setattr(chat, "_encode", lambda text, **kw: encoded.append(text) or encode(text, **kw))
    for text in (words * 1000, words[:64 * 20], words[:100]):
        env = Env(two_turns())
        monkeypatch.setattr(env, "_run", lambda call: text)
        episode = play(chat, env, [[PAY, "Done."], ["ok"]], Limits(total_tokens=10**6, observation_tokens=20))
        answer = f"<tool_response>\n{text}\n</tool_response>"
        assert episode.spans[2].text == answer[-64 * 20:] and max(map(len, encoded[1:])) <= 64 * 20
        span, ids = episode.spans[2], encode(answer[-64 * 1000:], data=True)
        assert episode.ids[span.start:span.end] == chat.head + ids[-20:] + chat.foot


def test_rewards_without_the_work():
    """results/robustness/rewards.md says what the policies earn that do not do the work."""
    documented = (ROOT / "results/robustness/rewards.md").read_text()
    assert rewards.table("tiny", rewards.tiny_tasks(300)) in documented
    assert "| nothing | 0, 0 of 300 |" in documented and "| junk in every turn | 0, 0 of 300 |" in documented


def test_policies():
    """Turn 1 pays bob; turn 2 asks for the balance, and so does turn 3."""
    task, check = two_turns(), ("check_balance", {})
    task.turns.append(task.turns[1])
    pay, = task.turns[0].calls
    assert rewards.at_once_then_junk(task) == [[pay, check, check], [rewards.JUNK], [rewards.JUNK]]
    assert rewards.each_twice(task) == [[pay, pay], [check, check], [check, check]]
    assert rewards.junk_for_reads(task) == [[pay], [rewards.JUNK], [rewards.JUNK]]
    assert rewards.junk_for_known_reads(task) == [[pay], [check], [rewards.JUNK]]
    assert rewards.reads_first(task) == [[check, check, pay], [rewards.JUNK], [rewards.JUNK]]
    assert rewards.solved([task], "junk for a read whose result is known") == "1, 1 of 1"
    assert rewards.solved([task], "each call twice") == "0, 0 of 1"


def test_noisy_scripts():
    """Without noise they are the ground truth; with noise the calls are wrong, or the messages malformed."""
    rng = random.Random(0)
    tasks = make_tasks("train", "base", 200)
    for syntax in "AB":
        truth = [truth_script(task, syntax) for task in tasks]
        assert [noisy_script(task, syntax, rng, 0, 0) for task in tasks] == truth
        states = []
        for task in tasks:
            for messages in noisy_script(task, syntax, rng, 0, 1):
                states += [parse(message, syntax).state for message in messages]
        assert sum(s in ("polluted", "collapsed", "empty") for s in states) > 0.9 * len(states)
        rewards = []
        for task in tasks:
            env = task.env(syntax)
            for messages in noisy_script(task, syntax, rng, 1, 0):
                run(env, messages)
            rewards.append(env.grade())
        assert env.status == "finished" and sum(rewards) < 0.2 * len(rewards)


def test_renamed_stories():
    """Under other names a story is solved by its ground truth, in both syntaxes; its tool list, or the turn
    that reveals a tool, spells every call; and the held-out app's tools are never shown."""
    rng, tools = random.Random(0), set()
    for task in make_tasks("train", "base", 150) + make_tasks("train", "miss_func", 150):
        new = renamed(task, rng)
        for syntax in "AB":
            env = new.env(syntax)
            for messages in truth_script(new, syntax):
                run(env, messages)
            assert env.grade() == 1
        shown = "\n".join([*new.docs.values(), *[turn.user for turn in new.turns if turn.reveal]])
        for turn in new.turns:
            for name, args in turn.calls:
                assert f"{name}({', '.join(args)})" in shown.splitlines()
        tools |= {line.split("(")[0] for line in shown.splitlines() if "(" in line}
    assert {"send_file", "brew_leaf"} <= tools and not tools & DOCS["post"].keys()
    task = Task("t", "base", dict(DOCS["bank"]), ["bank"], "seed", [
        Turn('pay money to "bob", 3 coins', [("pay_money", {"to": "bob", "amount": 3})], "Done.")])
    one = renamed(task, random.Random(1))
    verb, noun, to, amount = (one.names[word] for word in ("pay", "money", "to", "amount"))
    assert one.turns[0].user == f'{verb} {noun} {to} "bob", 3 coins' and task.turns[0].user.startswith("pay")
    assert one.turns[0].calls == [(f"{verb}_{noun}", {to: "bob", amount: 3})]
