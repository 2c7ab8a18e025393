"""analyze_tokens.py -- reading a run: what the messages became, and whether the reward collapsed. Floor 3.

    python analyze_tokens.py runs/a runs/b        scores, message states over time, and the verdict, of each run folder

    1. states     the shares of the message states in one batch of rollouts (train.py logs them every step)
    2. collapse   did the reward fall for good, and what had the messages become by then?
    3. texts      the line per step, the closing summary, the timeline
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from tools import STATES, UserError


def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def read_rows(out):
    """The rows of a run's metrics.jsonl; a last line that was cut in the middle (the run is going on, or was killed) is left out."""
    path = Path(out) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{out} holds no metrics.jsonl; name a run folder.")
    lines, rows = path.read_text().splitlines(), []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i < len(lines) - 1:
                raise UserError(f"line {i + 1} of {path} is damaged; delete it to read the rest.") from error
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# 1. States


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
# 2. Collapse


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
# 3. Texts


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
    return "\n".join(lines + [f"{name:18s}" + "".join(f"{100 * col[name]:9.1f}%" for col in columns.values()) for name in names])


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
    return "\n".join(text)


def timeline(rows, points=12):
    """The states over time: at most `points` lines, each the mean of its stretch of steps."""
    rows = [r for r in rows if "reward" in r]
    size = max(1, -(-len(rows) // points))
    lines = [" ".join(f"{name:>9s}" for name in ("steps", "reward", *STATES))]
    for i in range(0, len(rows), size):
        part = rows[i:i + size]
        shares = [mean(r[name] for r in part) for name in ("reward", *(f"state/{s}" for s in STATES))]
        lines.append(" ".join([f"{part[0]['step']:4d}-{part[-1]['step']:<4d}", *(f"{x:9.3f}" for x in shares)]))
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description="What happened in these runs?")
    p.add_argument("runs", nargs="+", help="run folders")
    status = 0
    for out in p.parse_args(argv).runs:
        print(f"== {out}")
        try:
            print(timeline(read_rows(out)), summary(out), sep="\n\n", end="\n\n")
        except UserError as error:                                   # say it, and go on with the other runs
            print(f"analyze_tokens.py: error: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
