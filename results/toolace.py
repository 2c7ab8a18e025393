"""results/toolace.py -- ToolACE's dialogues, as train.py --signal sft --sft_file FILE reads them.

    python results/toolace.py toolace.json > dialogues.jsonl             its calls written as <tool_call> JSON
    python results/toolace.py toolace.json --syntax B --out dialogues.jsonl              ... as [f(a='x')]

In:   a JSON list, or JSON lines, of {"system": 'Here is ... [{"name": "f", ...}]. ...', "conversations":
      [{"from": "user", "value": "Trends?"}, {"from": "assistant", "value": '[f(kind="x")]'}, ...]}
Out:  JSON lines of {"messages": [{"role": "system", "content": ...}, {"role": "user", "content": ...}, ...]},
      with the system message and the calls of the chosen syntax

How many entries could not be read is said on stderr.
"""
import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rollout import is_clean, parse, read_brackets, write_calls  # noqa: E402
from tools import UserError, openai_doc, tool_system  # noqa: E402


def read_entries(path):
    """A file of JSON lines, or of one JSON list -> {line number: entry}; a list's are numbered from 1"""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")          # with or without a mark at the beginning
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} cannot be read: it is not UTF-8; convert the file.") from error
    if text.lstrip().startswith("["):
        entries = dict(enumerate(read_json(text, path, 1), 1))
    else:
        lines = enumerate(text.split("\n"), 1)
        entries = {number: read_json(line, path, number) for number, line in lines if line.strip()}
    if not entries:
        raise UserError(f"{path} cannot be read: it is empty.")
    return entries


def read_json(text, path, line):
    """text: what stands in the file from this line on"""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1} cannot be read: {error.msg}.") from error
    except (ValueError, RecursionError) as error:        # thousands of digits, thousands of brackets
        raise UserError(f"{path}:{line} cannot be read: {error}.") from error


def read_toolace(path, syntax="A"):
    """-> the dialogues, each a list of messages, and how many entries could not be read"""
    dialogues = [toolace_dialogue(entry, syntax) for entry in read_entries(path).values()]
    readable = [messages for messages in dialogues if messages]
    if not readable:
        raise UserError(f"{path} cannot be read: none of its {len(dialogues)} entries is ToolACE's.")
    return readable, len(dialogues) - len(readable)


def toolace_dialogue(entry, syntax):
    """-> [{"role": "system", ...}, {"role": "user", ...}, {"role": "assistant", ...}, ...], or None if it
    cannot be read"""
    try:
        start = re.search(r'\[\s*\{\s*"', entry["system"]).start()   # the list of tools within the message
        docs, _ = json.JSONDecoder().raw_decode(entry["system"], start)
        names = sorted((doc["name"] for doc in docs), key=len, reverse=True)
        shown = [json.dumps(openai_doc(doc), ensure_ascii=False) for doc in docs]
        messages = [{"role": "system", "content": tool_system(shown, syntax)}]
        for turn in entry["conversations"]:
            who, text = turn["from"], turn["value"]
            text.encode()                        # no text at all, or half a character (a lone surrogate)
            if who == "assistant":
                text = text.strip()
                if text.startswith("["):
                    text = write_calls(toolace_calls(text, names), syntax)
                if syntax == "A" and not is_clean([parse(text).state]):      # in B "Market Trends()" is none
                    return None
            elif who == "tool":
                text = f"<tool_response>\n{text}\n</tool_response>"
            messages.append({"role": "assistant" if who == "assistant" else "user", "content": text})
        messages[0]["content"].encode()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):         # not as documented
        return None
    if messages[-1]["role"] == "user":
        messages.pop()                           # it has no answer to learn
    alternating = ["user" if i % 2 else "assistant" for i in range(1, len(messages))]
    return messages if len(messages) > 2 and [m["role"] for m in messages[1:]] == alternating else None


def toolace_calls(text, names):
    """'[Market Trends(kind="x")]' -> [("Market Trends", {"kind": "x"})]; ValueError if it is not that. Such
    names are no Python, so each one is replaced by an identifier before parsing, the longest first, because
    one may end like another."""
    for i, name in enumerate(names):
        text = text.replace(f"{name}(", f"tool_{i}_(")
    calls, _, _ = read_brackets(text)
    known = calls and all(re.fullmatch(r"tool_\d+_", name) for name, _ in calls)
    if not known or re.search(r"tool_\d+_\(", str([args for _, args in calls])):     # replaced inside a value
        raise ValueError(f"not a list of calls: {text[:80]}")
    return [(names[int(name[5:-1])], args) for name, args in calls]


def main(argv=None):
    p = argparse.ArgumentParser(description="ToolACE's dialogues -> what train.py --sft_file reads.")
    p.add_argument("file", help="ToolACE's JSON file")
    p.add_argument("--syntax", choices=("A", "B"), default="A", help="of the calls; default A")
    p.add_argument("--out", metavar="FILE", help="write there, not to stdout")
    args = p.parse_args(argv)
    try:
        dialogues, unreadable = read_toolace(args.file, args.syntax)
        text = "".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues)
        if args.out:
            Path(args.out).write_text(text)
        else:
            sys.stdout.write(text)
    except (UserError, OSError) as error:        # OSError: of --out
        print(f"toolace.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.file}: {len(dialogues)} dialogues; left out: {unreadable} that cannot be read",
          file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
