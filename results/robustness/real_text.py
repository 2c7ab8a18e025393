"""results/robustness/real_text.py -- how often does parse misread REAL text? What people and assistants said
in published data sets are replies, and right answers are calls.

    python results/robustness/real_text.py data_en/data_*.json bfcl_eval/data/BFCL_v4_*.json toolace.json
    python results/robustness/real_text.py FILES --rules DIR            with the parse of another checkout

Files: ACEBench's data_*.json (their answers beside them, in possible_answer/), BFCL's, ToolACE's; the first
entry says whose it is. Prints a Markdown table: how many of each kind are not read as what they are.
"""
import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def entries_of(path):
    """A JSON list, or JSON lines"""
    text = Path(path).read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def said_in(path):
    """-> (data set, [(who, text)], [[(name, arguments), ...] that are right])"""
    entries = entries_of(path)
    if "conversations" in entries[0]:
        return "ToolACE", *toolace(entries)
    if isinstance(entries[0]["question"], str):
        return "ACEBench", *acebench(entries, Path(path))
    talks = [message for entry in entries for turn in entry["question"] for message in turn]
    return "BFCL", [(m["role"], m["content"]) for m in talks if m["role"] != "system"], []


def acebench(entries, path):
    """A dialogue is one text, in which the assistant is called system: "user: Hi\\nsystem: Hello\\n". What it
    says in brackets are calls, of syntax B."""
    said, calls = [], []
    for entry in entries:
        _, *parts = re.split(r"(?m)^(user|system): ?", entry["question"])
        for who, text in zip(parts[::2], parts[1::2]):
            in_brackets = who == "system" and text.startswith("[")
            said.append(("user" if who == "user" else "brackets" if in_brackets else "assistant", text))
    answers = path.parent / "possible_answer" / path.name
    if path.name.startswith("data_normal") and answers.exists():
        for entry in entries_of(answers):
            truth = entry["ground_truth"]
            for answer in truth if isinstance(truth, list) else [truth]:
                calls.append([(re.sub(r"_\d+$", "", name), args) for name, args in answer.items()])
    return said, calls


def toolace(entries):
    """An assistant's message is a list of calls, with names that are no Python ("Market Trends"), or text"""
    from toolace import toolace_calls
    said, calls = [], []
    for entry in entries:
        start = re.search(r'\[\s*\{\s*"', entry["system"]).start()   # the list of tools within the message
        docs, _ = json.JSONDecoder().raw_decode(entry["system"], start)
        names = sorted((doc["name"] for doc in docs), key=len, reverse=True)
        for turn in entry["conversations"]:
            text = turn["value"].strip()
            try:
                calls.append([(re.sub(r"\W", "_", name), args) for name, args in toolace_calls(text, names)])
            except ValueError:
                said += [(turn["from"], text)] if turn["from"] != "tool" else []
    return said, calls


def main(argv=None):
    p = argparse.ArgumentParser(description="How often does parse misread real text?")
    p.add_argument("files", nargs="+")
    p.add_argument("--rules", default=ROOT, metavar="DIR", help="whose parse? default: this checkout")
    p.add_argument("--show", type=int, default=0, metavar="N", help="also the first N that are misread")
    args = p.parse_args(argv)
    sys.path[:0] = [str(args.rules), str(ROOT / "results")]
    from rollout import parse, write_calls
    total, wrong = Counter(), Counter()
    for path in args.files:
        name, said, calls = said_in(path)
        messages = [("brackets", "B", text, "call") for who, text in said if who == "brackets"]
        for syntax in "AB":
            messages += [(who, syntax, text, "reply") for who, text in said if who != "brackets"]
            messages += [("calls", syntax, write_calls(answer, syntax), "call") for answer in calls]
        for who, syntax, text, right in messages:
            kind = (name, who, syntax)
            total[kind] += 1
            state = parse(text, syntax).state
            if state not in (right, "empty"):
                wrong[kind] += 1
                if wrong[kind] <= args.show:
                    print(f"{kind}: {state}: {text[:200]!r}")
    print("| data | text of | syntax | texts | misread |\n|---|---|---|---|---|")
    for kind, n in total.items():
        print(f"| {' | '.join(kind)} | {n} | {wrong[kind]} ({100 * wrong[kind] / n:.2f} %) |")


if __name__ == "__main__":
    main()
