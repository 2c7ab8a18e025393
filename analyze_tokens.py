"""analyze_tokens.py -- reading a run: control-token probabilities, what the messages became, and the verdict. Floor 3.

    python analyze_tokens.py --markdown runs/*           one table row per run
    python analyze_tokens.py --plot a.png runs/a runs/b  reward, states and the open tag's probability on one time axis
    python analyze_tokens.py runs/a runs/b               scores, states over time and the verdict of each run

    1. probe      control-token probabilities in the right and in the wrong places, teacher-forced (train.py: --probe_every)
    2. states     the shares of the message states in one batch of rollouts (train.py logs them every step)
    3. collapse   did the reward fall for good, and what had the messages become by then?
    4. texts      the line per step, the closing summary, the timeline, a table row
    5. picture    the same, drawn
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from sft_step import micro_batches
from tools import CLOSE, OPEN, STATES, UserError


def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def read_rows(out):
    """The rows of a run's metrics.jsonl. A last line that was cut in the middle (the run goes on, or was killed) is left out."""
    path = Path(out) if str(out).endswith(".jsonl") else Path(out) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run folder, or a metrics.jsonl.")
    lines, rows = path.read_text().splitlines(), []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i < len(lines) - 1:
                raise UserError(f"line {i + 1} of {path} is damaged; delete it to read the rest.") from error
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# 1. The probe. Ground-truth conversations that never change, one forward pass, no sampling: a moving number is the model's
#    doing alone. Every position where the assistant speaks is a slot, and each control token is legal in one kind of slot only:
#
#      call     the first token of a message that should be a call     legal: <tool_call>
#      text     the first token of a message that should be text       <tool_call> here is the spike of the paper
#      open     right after <tool_call>                                the end token here is the collapsed message
#      in_call  inside a call      in_text  inside a text
#      close    where a call should close                              legal: </tool_call>
#      last     where the message should end                           legal: the end token
SLOTS = ("call", "text", "open", "in_call", "in_text", "close", "last")
LEGAL = {"open": "call", "close": "close", "end": "last", "start": None}        # `start`, <|im_start|>, is never right


def token_classes(chat):
    """-> {"open": [3], "close": [4], "end": [2], "start": [1], "json": [ids that spell only punctuation]}; the rest is content"""
    added, out = chat.tokenizer.get_added_vocab(), {}
    ids = {"open": added[OPEN], "close": added[CLOSE], "end": chat.end_id, "start": added.get("<|im_start|>")}
    out = {name: [] if i is None else [i] for name, i in ids.items()}
    texts = chat.tokenizer.batch_decode([[i] for i in range(len(chat.tokenizer))])
    return out | {"json": [i for i, text in enumerate(texts) if text.strip() and not set(text) - set(' \n{}[]()":,=\'')]}


def slots(chat, row):
    """A ground-truth Episode -> [(position, slot)] of every token that the assistant says; the logits that predict it stand
    one position before."""
    close, out = chat.tokenizer.get_added_vocab()[CLOSE], []
    for s in row.spans:
        for t in range(s.start, s.end) if s.who == "model" else ():
            is_call = s.state == "call"
            out.append((t, ("call" if is_call else "text") if t == s.start else "last" if t == s.end - 1 else
                        "close" if row.ids[t] == close else "open" if is_call and t == s.start + 1 else
                        "in_call" if is_call else "in_text"))
    return out


@torch.no_grad()
def probe(model, chat, rows, max_tokens=16_384, chunk=4096, classes=None):
    """Ground-truth Episodes -> {"p/open|text": .012, "p/end|open": .001, "p/short_circuit": ..., "p/calls_exact": ..., ...}

      p/CLASS|SLOT       mean probability of the class (open, close, end, start, json, content) in that kind of slot:
                         p/open|text  is P(<tool_call>) where text should begin; p/open|call is healthy near 1
      p/CLASS|off        the same over ALL slots where that control token is not legal
      p/short_circuit    p/open|text * p/end|open: the probability of the collapsed message in a place for text
      p/calls_exact      share of ground-truth calls whose every token is the model's first choice: can it still use tools?
      p/log_likelihood   mean log p of the ground truth"""
    model.eval()
    classes, total, exact, log_likelihood = classes or token_classes(chat), {}, [], []
    for batch in micro_batches(rows, max_tokens):
        width = max(len(r.ids) for r in batch)
        ids = torch.tensor([r.ids + [0] * (width - len(r.ids)) for r in batch], device=model.device)         # [B, T]
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state                       # [B, T, D]
        where = [(b, t, slot) for b, r in enumerate(batch) for t, slot in slots(chat, r)]
        h = hidden[[b for b, _, _ in where], [t - 1 for _, t, _ in where]]                                   # [N, D]
        target = ids[[b for b, _, _ in where], [t for _, t, _ in where]]                                     # [N]
        right, p = [], []
        for part, wanted in zip(h.split(chunk), target.split(chunk)):
            logp = torch.log_softmax(model.get_output_embeddings()(part).float(), -1)                        # [n, V]
            log_likelihood += logp.gather(1, wanted[:, None])[:, 0].tolist()
            right += (logp.argmax(-1) == wanted).tolist()
            p += torch.stack([logp[:, c].exp().sum(-1) for c in classes.values()], -1).tolist()              # [n, 5]
        ok_calls = {}                            # {(row, start of a call): every token right so far?}
        for (b, t, slot), ok, values in zip(where, right, p):
            for name, value in [*zip(classes, values), ("content", 1 - sum(values))]:
                total.setdefault(f"p/{name}|{slot}", []).append(value)
                if name in LEGAL and slot != LEGAL[name]:
                    total.setdefault(f"p/{name}|off", []).append(value)
            if slot == "call":                   # its first token is given: calling at all is p/open|call
                ok_calls[b, t], start = True, t
            elif slot in ("open", "in_call", "close") or (slot == "last" and (b, start) in ok_calls):
                ok_calls[b, start] &= ok
            if slot == "text":
                start = t
        exact += ok_calls.values()
    names = [f"p/{c}|{s}" for c in (*classes, "content") for s in SLOTS] + [f"p/{c}|off" for c in LEGAL]
    out = {name: mean(total.get(name, [])) for name in names}
    return out | {"p/short_circuit": out["p/open|text"] * out["p/end|open"], "p/calls_exact": mean(exact),
                  "p/log_likelihood": mean(log_likelihood)}


# ----------------------------------------------------------------------------------------------------------------------
# 2. States


def rollout_metrics(done):
    """[(group id, reward, states, status, sampled tokens, source)] of all ranks -> the metrics of one batch of rollouts.
    Ground truth in the group counts for mixed_groups, because it takes part in the advantage, and for nothing else."""
    groups = {}
    for group, reward, *_ in done:
        groups.setdefault(group, []).append(reward)
    mixed = mean(len(set(rewards)) > 1 for rewards in groups.values())           # the others teach nothing
    done = [d for d in done if d[5] != "truth"]
    states, status = Counter(s for d in done for s in d[2]), Counter(d[3] for d in done)
    return {"reward": mean(d[1] for d in done), "mixed_groups": mixed,
            **{f"state/{s}": states[s] / max(states.total(), 1) for s in STATES},
            "no_call": mean("call" not in d[2] for d in done),
            "messages": states.total() / len(done), "message_tokens": sum(d[4] for d in done) / max(states.total(), 1),
            **{f"status/{s}": count / len(done) for s, count in sorted(status.items())}}


# ----------------------------------------------------------------------------------------------------------------------
# 3. Collapse, and the alarm before it


class Alarm:
    """On after `checks` values in a row above factor x baseline (the mean of the first 3 values), off after as many below half
    of that: hysteresis, so that one odd probe neither rings nor silences it.

    Alarm(3, 2).update(v) for v in .02 .02 .02 .07 .05 .07 .08 .04 .02 .02  ->  on from .08 on (two above .06), off at the
    last value (two below .03)"""

    def __init__(self, factor, checks):
        self.factor, self.checks, self.first, self.run, self.on = factor, checks, [], 0, False

    def update(self, value):
        if len(self.first) < 3:
            self.first.append(value)
            return self.on
        limit = self.factor * mean(self.first)
        against = value > limit if not self.on else value < limit / 2        # a value that speaks for a change
        self.run = self.run + 1 if against else 0
        if self.run == self.checks:
            self.on, self.run = not self.on, 0
        return self.on


def collapse(rows, window=5):
    """Did the reward collapse, and what had the messages become? From the rows of metrics.jsonl that have a reward.
    -> {"step": 65, "peak": .31, "peak_step": 40, "before": {state: share at the peak}, "after": {state: share at the end}}
    Collapse = the mean reward over `window` steps falls below 10 % of its peak and stays there to the end."""
    rows = [r for r in rows if "reward" in r]
    smooth = [mean(r["reward"] for r in rows[max(0, i + 1 - window):i + 1]) for i in range(len(rows))]
    if len(rows) < 2 * window:
        return None
    top = max(range(window - 1, len(rows)), key=smooth.__getitem__)
    first = len(rows)                            # walk back from the end, as long as the reward is low
    while first > top and smooth[first - 1] < 0.1 * smooth[top]:
        first -= 1
    if first == len(rows):
        return None
    at = lambda i: {s: mean(r[f"state/{s}"] for r in rows[max(0, i + 1 - window):i + 1]) for s in STATES}
    return {"step": rows[first]["step"], "peak": smooth[top], "peak_step": rows[top]["step"], "before": at(top),
            "after": at(len(rows) - 1)}


# ----------------------------------------------------------------------------------------------------------------------
# 4. Texts


def one_line(row):
    line = f"step {row['step']:4d}  {row['phase']:3s}"
    if "reward" in row:
        line += f"  reward {row['reward']:.3f}  mixed {row['mixed_groups']:.2f}  |  " + \
            "  ".join(f"{s} {row[f'state/{s}']:.2f}" for s in STATES) + f"  |  entropy {row['entropy']:.3f}"
    if "sft_rows" in row:
        line += f"  {row['sft_updates']} SFT updates on {row['sft_rows']} rows"
    if "sft_loss" in row:
        line += f"  sft_loss {row['sft_loss']:.3f}"
    return line + (f"  grad {row['grad_norm']:.2f}" if "grad_norm" in row else "") + f"  {row['seconds']:.1f} s"


def table(columns):
    """{"before": {"base": .1}, "after": {"base": .3}} -> a text table, one line per score"""
    names = list(next(iter(columns.values())))
    lines = [" " * 18 + "".join(f"{c:>10s}" for c in columns)]
    for name in names:
        lines.append(f"{name:18s}" + "".join(f"{100 * column[name]:9.1f}%" for column in columns.values()))
    return "\n".join(lines)


def summary(out):
    """What a run did, as text: scores before and after, and whether it collapsed. Works on a run that is still going on."""
    rows = read_rows(out)
    evals = [{k[5:]: v for k, v in r.items() if k.startswith("eval/")} for r in rows if "eval/average" in r]
    text = [table({"before": evals[0], "after": evals[-1]})] if evals else []
    if found := collapse(rows):
        shift = ", ".join(f"{s} {found['before'][s]:.2f} -> {found['after'][s]:.2f}" for s in STATES)
        text.append(f"\nCOLLAPSE at step {found['step']}: the reward fell below a tenth of its peak ({found['peak']:.2f} at step "
                    f"{found['peak_step']}) and stayed there.\nWhat the messages became: {shift}.")
    elif any("reward" in r for r in rows):
        text.append("\nNo collapse: the reward never fell below a tenth of its peak for good.")
    if skipped := sum(r.get("skipped_updates", 0) for r in rows):
        text.append(f"{skipped} update(s) were skipped because a loss or gradient was not finite.")
    probes = [r for r in rows if "p/open|text" in r]
    if len(probes) > 1:
        for name, meaning in (("p/open|text", "P(<tool_call> where text should begin)"),
                              ("p/end|open", "P(end right after <tool_call>)"),
                              ("p/calls_exact", "ground-truth calls that are the model's first choice, token by token")):
            text.append(f"{probes[0][name]:.4f} -> {probes[-1][name]:.4f}   {meaning}")
    return "\n".join(text)


def timeline(rows, points=12):
    """The run over time: at most `points` lines, each the mean of its stretch of steps."""
    names = {"reward": "reward", **{s: f"state/{s}" for s in STATES},
             "open|text": "p/open|text", "end|open": "p/end|open", "exact": "p/calls_exact"}
    rolled = [r for r in rows if "reward" in r]
    size = max(1, -(-len(rolled) // points))
    lines = [" ".join(f"{name:>9s}" for name in ("steps", *names))]
    for i in range(0, len(rolled), size):
        first, last = rolled[i]["step"], rolled[min(i + size, len(rolled)) - 1]["step"]
        part = [r for r in rows if first <= r["step"] <= last]
        values = [[r[name] for r in part if name in r] for name in names.values()]
        lines.append(" ".join([f"{first:4d}-{last:<4d}", *(f"{mean(v):9.4f}" if v else " " * 9 for v in values)]))
    return "\n".join(lines)


HEADER = """| run | reward: first, peak, last | P(`<tool_call>` where text should begin): first, highest | clean replies: first, lowest | collapse |
|---|---|---|---|---|"""


def table_row(path, window=5):
    """One run as a row of README's tables (a test makes them again from the raw rows); means over `window` steps."""
    rows = read_rows(path)
    rolled, probes = [r for r in rows if "reward" in r], [r["p/open|text"] for r in rows if "p/open|text" in r]
    if len(rolled) < window or not probes:
        raise UserError(f"{path} has {len(rolled)} RL steps and {len(probes)} probes; a table row needs {window} and 1.")
    smooth = lambda name: [mean(r[name] for r in rolled[i:i + window]) for i in range(len(rolled) - window + 1)]
    reward, replies, found = smooth("reward"), smooth("state/reply"), collapse(rows, window)
    return (f"| {Path(path).stem} | {reward[0]:.2f}, {max(reward):.2f}, {reward[-1]:.2f} | {probes[0]:.3f}, {max(probes):.3f} | "
            f"{replies[0]:.2f}, {min(replies):.2f} | {'step ' + str(found['step']) if found else 'no'} |")


# ----------------------------------------------------------------------------------------------------------------------
# 5. Picture. Readable in black and white: the states differ in hatching as well as in grey value.
FILLS = {"call": ("#1b5e9b", ""), "reply": ("#9ec9ea", ""), "polluted": ("#e08214", "///"), "collapsed": ("#7f3b08", "xx"),
         "empty": ("#cccccc", ".."), "cut": ("#666666", "--")}


def draw(paths, png):
    """One column per run: reward; shares of the message states, stacked; P(open tag) where text should begin."""
    import matplotlib                            # here, because training does not need it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(3, len(paths), figsize=(1 + 3.2 * len(paths), 6.2), sharex="col", sharey="row", squeeze=False,
                             height_ratios=[1, 1.4, 1])
    for (top, middle, bottom), path in zip(axes.T, paths):
        rows = read_rows(path)
        rolled, probes, found = [r for r in rows if "reward" in r], [r for r in rows if "p/open|text" in r], collapse(rows)
        steps = [r["step"] for r in rolled]
        top.plot(steps, [r["reward"] for r in rolled], color="#999999", lw=0.8)
        top.plot(steps, [mean(r["reward"] for r in rolled[max(0, i - 4):i + 1]) for i in range(len(rolled))], color="black")
        middle.stackplot(steps, [[r[f"state/{s}"] for r in rolled] for s in STATES], labels=STATES,
                         colors=[FILLS[s][0] for s in STATES], hatch=[FILLS[s][1] for s in STATES], edgecolor="white", lw=0.2)
        bottom.plot([r["step"] for r in probes], [r["p/open|text"] for r in probes], "k.-", lw=1)
        bottom.set_yscale("log")
        for ax in (top, middle, bottom) if found else ():
            ax.axvline(found["step"], color="black", ls=":", lw=1.2)
        top.set_title(f"{Path(path).stem}{': collapse at step ' + str(found['step']) if found else ''}", fontsize=9)
        bottom.set_xlabel("step")
    axes[0, 0].set_ylabel("reward\n(grey: per step, black: mean of 5)", fontsize=8)
    axes[1, 0].set_ylabel("share of messages", fontsize=8)
    axes[2, 0].set_ylabel("P(<tool_call>)\nwhere text should begin", fontsize=8)
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="lower center", ncol=len(STATES), fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0.04, 1, 1))
    fig.savefig(png, dpi=110)
    plt.close(fig)


def main(argv=None):
    p = argparse.ArgumentParser(description="What happened in these runs?")
    p.add_argument("runs", nargs="+", help="run folders, or metrics.jsonl files")
    p.add_argument("--markdown", action="store_true", help="one table row per run")
    p.add_argument("--plot", metavar="PNG", help="draw the runs side by side")
    a, status = p.parse_args(argv), 0
    if a.markdown:
        print(HEADER)
    drawn = []
    for out in a.runs:
        try:
            if a.plot:
                drawn += [out] if [r for r in read_rows(out) if "reward" in r] else []
            elif a.markdown:
                print(table_row(out))
            else:
                print(f"== {out}", timeline(read_rows(out)), summary(out), sep="\n\n", end="\n\n")
        except UserError as error:                                   # say it, and go on with the other runs
            print(f"analyze_tokens.py: error: {error}", file=sys.stderr)
            status = 2
    if drawn:
        draw(drawn, a.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
