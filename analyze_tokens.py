"""analyze_tokens.py -- reading a run: control-token probabilities, what the messages became, and the verdict. Floor 3.

    python analyze_tokens.py runs/a runs/b               scores, states over time and the verdict of each run
    python analyze_tokens.py --plot a.png runs/a runs/b  reward, states and the open tag's probability on one time axis
    python analyze_tokens.py --heat h.png runs/a         every control token in every kind of place, over time
    python analyze_tokens.py --transcripts runs/a        conversations from healthy to collapsed
    python analyze_tokens.py --probe runs/a              the control tokens' probabilities in its newest checkpoint
    python analyze_tokens.py --autopsy runs/BASE runs/a  what exactly is broken?

    1. probe      control-token probabilities in the right and in the wrong places, teacher-forced (train.py: --probe_every)
    2. states     the shares of the message states in one batch of rollouts (train.py logs them every step)
    3. collapse   did the reward fall for good, what had the messages become by then, and did an alarm ring before?
    4. texts      the line per step, the closing summary, the timeline, a table row
    5. autopsy    constrained decoding, swapped decisions, repair: lost ability, or misplaced control tokens?
    6. pictures   the same, drawn
"""
import argparse
import copy
import csv
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout import Chat, HFEngine, Limits, begin, play, rollout
from sft_step import lay_out, micro_batches, optimizer_step, sft_backward, token_logprobs, trunk
from tools import CATEGORIES, CLOSE, CONTROL, OPEN, STATES, Env, UserError, demonstration, make_tasks, parse


def mean(values):
    """[1, 2] -> 1.5, [] -> 0.0"""
    values = list(values)
    return sum(values) / max(len(values), 1)


def read_rows(out):
    """The rows of a run's metrics.jsonl, or of a study's CSV (the same, merged by step). A last line that was cut in the middle
    (the run goes on, or was killed) is left out."""
    path = Path(out) if str(out).endswith((".jsonl", ".csv")) else Path(out) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run folder, or a metrics.jsonl.")
    if path.suffix == ".csv":
        with open(path, newline="") as f:
            return [{k: v if k == "phase" else int(v) if v.lstrip("-").isdigit() else float(v) for k, v in row.items() if v}
                    for row in csv.DictReader(f)]
    lines, rows = path.read_text().splitlines(), []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i < len(lines) - 1:
                raise UserError(f"line {i + 1} of {path} is damaged; delete it to read the rest.") from error
    return rows


def run_name(path):
    """"runs/none-lr1e-3-kl0.01" -> "none-lr1e-3-kl0.01", "results/study/none-seed0.csv" -> "none-seed0" """
    return Path(path).name.removesuffix(".csv").removesuffix(".jsonl")


def smooth(rows, name, window=5):
    """-> steps, mean of the metric over the last `window` rows that have it"""
    rows = [r for r in rows if name in r]
    return [r["step"] for r in rows], [mean(r[name] for r in rows[max(0, i + 1 - window):i + 1]) for i in range(len(rows))]


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
LEGAL = {"open": "call", "close": "close", "end": "last", "start": None}        # `start`, <|im_start|>, is never right; in
                                                                                # syntax B, neither are `open` and `close`
PROBED = (*(f"p/{c}|{s}" for c in (*LEGAL, "json", "content") for s in SLOTS), *(f"p/{c}|off" for c in LEGAL),
          "p/short_circuit", "p/calls_exact", "p/log_likelihood", "p/moved")


def token_classes(chat):
    """-> {"open": [3], "close": [4], "end": [2], "start": [1], "json": [ids that spell only punctuation]}; content: the rest"""
    added = chat.tokenizer.get_added_vocab()
    ids = {"open": added[OPEN], "close": added[CLOSE], "end": chat.end_id, "start": added.get("<|im_start|>")}
    out = {name: [] if i is None else [i] for name, i in ids.items()}
    texts = chat.tokenizer.batch_decode([[i] for i in range(len(chat.tokenizer))])
    return out | {"json": [i for i, text in enumerate(texts) if text.strip() and not set(text) - set(' \n{}[]()":,=\'')]}


def slots(chat, row):
    """A ground-truth Episode -> [(position, slot)] of every token that the assistant says; the logits that predict it stand
    one position before."""
    added, out = chat.tokenizer.get_added_vocab(), []
    for s in row.spans:
        for t in range(s.start, s.end) if s.who == "model" else ():
            is_call = s.state == "call"
            out.append((t, ("call" if is_call else "text") if t == s.start else "last" if t == s.end - 1 else
                        "close" if row.ids[t] == added[CLOSE] else "open" if row.ids[t - 1] == added[OPEN] else
                        "in_call" if is_call else "in_text"))
    return out


@torch.no_grad()
def probe(model, chat, rows, max_tokens=16_384, chunk=4096, classes=None, start=None):
    """Ground-truth Episodes -> {"p/open|text": .012, "p/end|open": .001, "p/short_circuit": ..., "p/calls_exact": ..., ...}

      p/CLASS|SLOT       mean probability of the class (open, close, end, start, json, content) in that kind of slot:
                         p/open|text  is P(<tool_call>) where text should begin; p/open|call is healthy near 1
      p/CLASS|off        the same over ALL places where another token is right
      p/short_circuit    p/open|text * p/end|open, a stand-in for the probability of the collapsed message (the second factor is
                         measured behind the tag in places for a call, since no ground truth has a tag in a place for text)
      p/calls_exact      share of ground-truth calls whose every token is the model's first choice: can it still use tools?
      p/log_likelihood   mean log p of the ground truth
      p/moved            with `start` (truth_logprobs of the model that the run started from): mean |log p - log p_start|"""
    model.eval()
    classes, total, exact, log_likelihood = classes or token_classes(chat), {}, [], []
    for batch in micro_batches(rows, max_tokens):
        ids, *_ = lay_out(batch, False, model.device)                                                        # [B, T]
        hidden = trunk(model, ids)                                                                           # [B, T, D]
        where = [(b, t, slot) for b, r in enumerate(batch) for t, slot in slots(chat, r)]
        h = hidden[[b for b, _, _ in where], [t - 1 for _, t, _ in where]]                                   # [N, D]
        target = ids[[b for b, _, _ in where], [t for _, t, _ in where]]                                     # [N]
        right, p = [], []
        for part, wanted in zip(h.split(chunk), target.split(chunk)):
            logp = torch.log_softmax(model.get_output_embeddings()(part).float(), -1)                        # [n, V]
            log_likelihood += logp.gather(1, wanted[:, None])[:, 0].tolist()
            right += (logp.argmax(-1) == wanted).tolist()
            p += torch.stack([logp[:, c].exp().sum(-1) for c in classes.values()], -1).tolist()              # [n, 5]
        for (b, t, slot), ok, values in zip(where, right, p):
            for name, value in [*zip(classes, values), ("content", 1 - sum(values))]:
                total.setdefault(f"p/{name}|{slot}", []).append(value)
                if name in LEGAL and batch[b].ids[t] not in classes[name]:
                    total.setdefault(f"p/{name}|off", []).append(value)
            if slot in ("call", "text"):         # a message begins
                in_call = slot == "call"
                exact += [True] * in_call        # a call's first token is given: calling at all is p/open|call
            elif in_call:
                exact[-1] &= ok
    out = {name: mean(total[name]) for name in PROBED if name in total}          # syntax B has no slots `open` and `close`
    if start:
        out["p/moved"] = mean(abs(now - before) for now, before in zip(log_likelihood, start, strict=True))
    return out | {"p/short_circuit": out["p/open|text"] * out.get("p/end|open", 0.0), "p/calls_exact": mean(exact),
                  "p/log_likelihood": mean(log_likelihood)}


@torch.no_grad()
def truth_logprobs(model, rows, max_tokens=16_384):
    """-> log p of every token that the assistant says in `rows`, in probe's order"""
    return [x for batch in micro_batches(rows, max_tokens) for x in token_logprobs(model, batch)[0].tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# 2. States


def is_clean(states):
    """["call", "reply"] -> True: every message is a complete call or plain text. The lenient reward does not ask for that."""
    return not set(states) - {"call", "reply"}


def rollout_metrics(done):
    """[(Episode, credit)] of all ranks -> the metrics of one batch of rollouts. Ground truth and hinted rollouts count for
    mixed_groups, because they take part in the advantage, and for nothing else."""
    groups = {}
    for e, credit in done:
        groups.setdefault(e.group_id, set()).add(credit)
    mixed = mean(len(credits) > 1 for credits in groups.values())                # the others teach nothing
    done = [e for e, _ in done if e.source == "policy"]
    states, status = Counter(s for e in done for s in e.states), Counter(e.status for e in done)
    return {"reward": mean(e.reward for e in done), "reward_clean": mean(e.reward * is_clean(e.states) for e in done),
            "mixed_groups": mixed,
            **{f"state/{s}": states[s] / max(states.total(), 1) for s in STATES},
            "no_call": mean("call" not in e.states for e in done),
            "messages": states.total() / len(done), "message_tokens": sum(sum(e.mask) for e in done) / max(states.total(), 1),
            **{f"status/{s}": count / len(done) for s, count in sorted(status.items())}}


# ----------------------------------------------------------------------------------------------------------------------
# 3. Collapse, and the alarm before it


class Alarm:
    """On after `checks` values in a row above factor x the mean of the first `baseline` values, off after as many below half of
    that: hysteresis, so that one odd probe neither rings nor silences it.

    Alarm(3, 2).update(v) for v in .02 .02 .02 .07 .05 .07 .08 .04 .02 .02  ->  on from .08 on (two above .06), off at the
    last value (two below .03)"""

    def __init__(self, factor, checks, baseline=3):
        self.factor, self.checks, self.baseline, self.first, self.run, self.on = factor, checks, baseline, [], 0, False

    def update(self, value):
        if len(self.first) < self.baseline:
            self.first.append(value)
            return self.on
        limit = self.factor * mean(self.first)
        wants_change = value < limit / 2 if self.on else value > limit
        self.run = self.run + 1 if wants_change else 0
        if self.run == self.checks:
            self.on, self.run = not self.on, 0
        return self.on


def collapse(rows, window=5, name="reward", share=0.1):
    """Did the reward collapse, and what had the messages become? From the rows of metrics.jsonl that have a reward.
    -> {"step": 65, "peak": .31, "peak_step": 40, "before": {state: share at the peak}, "after": {state: share at the end}}
    Collapse = the mean reward over `window` steps falls below `share` of its peak and stays there to the end."""
    rows = [r for r in rows if name in r]
    if len(rows) < 2 * window:
        return None
    _, values = smooth(rows, name, window)
    top = max(range(window - 1, len(rows)), key=values.__getitem__)
    first = len(rows)                            # walk back from the end, as long as the reward is low
    while first > top and values[first - 1] < share * values[top]:
        first -= 1
    if first == len(rows):
        return None
    at = lambda i: {s: smooth(rows, f"state/{s}", window)[1][i] for s in STATES}
    return {"step": rows[first]["step"], "peak": values[top], "peak_step": rows[top]["step"], "before": at(top),
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
    lines = [" " * 18 + "".join(f"{c:>10s}" for c in columns)]
    for name in next(iter(columns.values())):
        lines.append(f"{name:18s}" + "".join(f"{100 * column[name]:9.1f}%" for column in columns.values()))
    return "\n".join(lines)


def summary(out):
    """What a run did, as text: scores before and after, and whether it collapsed. Works on a run that is still going on."""
    rows = read_rows(out)
    evals = [{k[5:]: v for k, v in r.items() if k.startswith("eval/")} for r in rows if "eval/average" in r]
    text = [table({"before": evals[0], "after": evals[-1]})] if evals else []
    found, clean = collapse(rows), collapse(rows, name="reward_clean")
    if found or clean:
        what, event = ("reward", found) if found else ("CLEAN reward (solved, every message a complete call or plain text)", clean)
        shift = ", ".join(f"{s} {event['before'][s]:.2f} -> {event['after'][s]:.2f}" for s in STATES)
        text.append(f"\nCOLLAPSE at step {event['step']}: the {what} fell below a tenth of its peak ({event['peak']:.2f} at step "
                    f"{event['peak_step']}) and stayed there.\nWhat the messages became: {shift}.")
        if not found:
            text.append(f"The task reward does not see it (last 5 steps: {smooth(rows, 'reward')[1][-1]:.2f}): with --closing "
                        "lenient any message without a complete call ends the turn.")
    elif any("reward" in r for r in rows):
        text.append("\nNo collapse: neither the reward nor the clean reward fell below a tenth of its peak for good.")
    if skipped := sum(r.get("skipped_updates", 0) for r in rows):
        text.append(f"{skipped} update(s) were skipped because a loss or gradient was not finite.")
    probes = [r for r in rows if "p/open|text" in r]
    if len(probes) > 1:
        for name, meaning in (("p/open|text", "P(<tool_call> where text should begin)"),
                              ("p/end|open", "P(end right after <tool_call>)"),
                              ("p/calls_exact", "ground-truth calls that are the model's first choice, token by token")):
            if name in probes[0]:                # syntax B has no tag to end behind
                text.append(f"{probes[0][name]:.4f} -> {probes[-1][name]:.4f}   {meaning}")
    return "\n".join(text)


def timeline(rows, points=12):
    """The run over time: at most `points` lines, each the mean of its stretch of steps."""
    names = {"reward": "reward", "clean": "reward_clean", **{s: f"state/{s}" for s in STATES},
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


# ----------------------------------------------------------------------------------------------------------------------
# 5. The autopsy of a checkpoint. It fails; but what exactly is broken? Each line replaces one thing and plays the test
#    tasks again, so that it separates "lost the ability" from "puts a control token into the wrong place". The score of
#    every line that names no other is the clean reward, greedy: solved, and every message a complete call or plain text.


def load(path):
    """A run folder (its newest checkpoint), RUN/checkpoints/step-N, or a Hugging Face folder
    -> model, Chat, the run's flags ({} if there are none)"""
    path = Path(path)
    run = next((p for p in (path, *path.parents[:2]) if (p / "config.json").exists() and (p / "metrics.jsonl").exists()), None)
    if path == run:
        if not (path / "checkpoints" / "latest").exists():
            raise UserError(f"{path} has no checkpoint yet; name another run, or a Hugging Face folder.")
        path = path / "checkpoints" / (path / "checkpoints" / "latest").read_text().strip()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        chat = Chat(AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {path}: {str(error).strip().splitlines()[0]}") from error
    return model, chat, json.loads((run / "config.json").read_text()) if run else {}


def played(model, chat, tasks, syntax, closing, limits, temperature=0.0, rule=None):
    """The tasks, played freely -> Episodes"""
    engine, envs = HFEngine(model, chat.stop_ids), [Env(task, syntax, closing) for task in tasks]
    engine.rule = rule
    begun = [begin(chat, env, g) for g, env in enumerate(envs)]
    return rollout(engine, chat, envs, limits, begun, seed=(0,), temperature=temperature)


def truths(chat, tasks, syntax, limits):
    """-> the ground truth of the tasks as Episodes"""
    return [play(chat, Env(task, syntax), demonstration(task, syntax), limits) for task in tasks]


def two_rules(chat):
    """No weights change: the end token is forbidden right after <tool_call>, and <tool_call> once a text has begun."""
    open_id = chat.tokenizer.get_added_vocab()[OPEN]

    def rule(logits, said):                      # [n, V], the n messages so far
        for row, ids in enumerate(said):
            if ids and ids[-1] == open_id:
                logits[row, list(chat.stop_ids)] = -torch.inf
            if ids and ids[0] != open_id:
                logits[row, open_id] = -torch.inf
        return logits
    return rule


class Swapped:
    """Two models that speak as one: the DONOR decides about the tokens `ids`, the HOST about everything else.

        p(k) = p_donor(k)                                              k in ids
        p(k) = p_host(k) (1 - p_donor(ids)) / (1 - p_host(ids))        all other k

    Both read the same conversation; their keys and values stand in one SlotCache, the donor's layers behind the host's.
    It has the five names that HFEngine asks a model for."""

    def __init__(self, host, donor, ids):
        self.host, self.donor, self.ids, self.device = host, donor, ids, host.device
        self.n = host.config.num_hidden_layers
        self.config = SimpleNamespace(num_hidden_layers=self.n + donor.config.num_hidden_layers)

    def eval(self):
        pass

    def get_decoder(self):
        def body(past_key_values, **kw):
            behind = SimpleNamespace(update=lambda k, v, layer, *a, **b: past_key_values.update(k, v, layer + self.n),
                                     get_seq_length=lambda *a: 0)
            two = [m.get_decoder()(past_key_values=cache, **kw).last_hidden_state
                   for m, cache in ((self.host, past_key_values), (self.donor, behind))]
            return SimpleNamespace(last_hidden_state=torch.cat(two, -1))                             # [n, c, 2 D]
        return body

    def get_output_embeddings(self):
        def head(hidden):
            one, two = hidden.chunk(2, -1)
            p = torch.softmax(self.host.get_output_embeddings()(one).double(), -1)                   # [n, V]
            q = torch.softmax(self.donor.get_output_embeddings()(two).double(), -1)[:, self.ids]     # [n, K]
            p[:, self.ids] = 0
            p *= (1 - q.sum(-1, keepdim=True)) / p.sum(-1, keepdim=True).clamp(min=1e-30)
            p[:, self.ids] = q
            return p.log()
        return head


@torch.no_grad()
def knows(model, chat, tasks, syntax, limits):
    """Teacher-forced: with the ground truth up to a point given, is every further token of the call (up to its last brace,
    without the closing tag) the model's first choice? -> shares for the points [<tool_call>, the name's start, its end];
    syntax B has no tag, so its first point is the message's beginning"""
    hits = []
    for row in truths(chat, tasks, syntax, limits):
        logits = model(torch.tensor([row.ids], device=model.device)).logits[0]                       # [T, V]
        for s in row.spans:
            if s.state != "call":
                continue
            name = parse(s.text, syntax).calls[0][0]
            lengths = [len(chat.text(row.ids[s.start:t + 1])) for t in range(s.start, s.end)]         # characters said by t
            stop = max(s.text.rfind("}"), s.text.rfind(")")) + 1
            right = [(said, bool(logits[t - 1].argmax() == row.ids[t]))
                     for t, before, said in zip(range(s.start, s.end), [0, *lengths], lengths) if before < stop]
            points = (len(OPEN) if s.text.startswith(OPEN) else 0, s.text.index(name), s.text.index(name) + len(name))
            hits.append([all(ok for said, ok in right if said > point) for point in points])
    return [mean(column) for column in zip(*hits)]


def repaired(model, chat, tasks, syntax, limits, steps, lr, score, only=None):
    """A copy of the model, `steps` cross-entropy steps on 32 ground-truth conversations each -> score(copy).
    only: train only where these token ids stand."""
    model, rows = copy.deepcopy(model).train(), truths(chat, tasks, syntax, limits)
    random.Random("repair").shuffle(rows)        # tasks come sorted by category
    for row in rows if only else ():
        row.mask = [m * (i in only) for m, i in zip(row.mask, row.ids)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        metrics = sft_backward(model, [rows[(32 * step + i) % len(rows)] for i in range(32)])
        optimizer_step(model, optimizer, 1.0, metrics["sft_loss"])
    return score(model.eval())


@torch.no_grad()
def risers(model, base, chat, rows, top=5):
    """Which tokens gained most probability where they do not belong, of ALL the vocabulary?
    -> [(token, mean probability before, after)]; a place counts for every token but the right one"""
    means = []
    for m in (base, model):
        total, n = 0, 0
        for row in rows:
            where = [t for t, _ in slots(chat, row)]
            p = torch.softmax(m(torch.tensor([row.ids], device=m.device)).logits[0][[t - 1 for t in where]].float(), -1)
            p[range(len(where)), [row.ids[t] for t in where]] = 0
            total, n = total + p.sum(0), n + len(where)
        means.append(total / n)                                                                      # [V]
    best = (means[1] - means[0]).topk(top).indices.tolist()
    return [(chat.text([i]), means[0][i].item(), means[1][i].item()) for i in best]


def autopsy(path, against, n_tasks=30, sft_lr=5e-4):
    """-> {"line of the report": number}; printed by --autopsy, a JSON file with --json. It plays the embedded world's tasks."""
    (model, chat, flags), (base, _, _) = load(path), load(against)
    syntax, closing = flags.get("syntax", "A"), flags.get("closing", "lenient")
    limits = Limits(flags.get("max_messages", 16), flags.get("max_message_tokens", 64), flags.get("max_total_tokens", 1024),
                    flags.get("max_observation_tokens", 256))
    pick = lambda split: [t for c in CATEGORIES[:3] for t in make_tasks(split, c, n_tasks if split == "test" else 100)]
    tasks, train, other = pick("test"), pick("train"), "B" if syntax == "A" else "A"
    play_all = lambda m, s=syntax, **kw: played(m, chat, tasks, s, closing, limits, **kw)
    score = lambda *args, **kw: mean(e.reward * is_clean(e.states) for e in play_all(*args, **kw))
    added = chat.tokenizer.get_added_vocab()
    control = sorted({added[token] for token in CONTROL if token in added} | {chat.end_id})
    said = Counter(i for r in truths(chat, train, syntax, limits) for i, m in zip(r.ids, r.mask) if m and i not in control)
    others = [i for i, _ in said.most_common(len(control))]          # the hardest comparison: as many, and said more often
    out = {}

    def note(name, value):
        out[name] = value
        print(f"{value:8.3f}   {name}", flush=True)

    for who, m in (("base", base), ("model", model)):
        note(f"{who}: task reward, greedy", mean(e.reward for e in play_all(m)))
        note(f"{who}: clean reward, greedy", score(m))
        note(f"{who}: clean reward, sampled", score(m, temperature=1.0))
        note(f"{who}: clean reward in syntax {other}, greedy", score(m, other))
        failed = [e for e in play_all(m, temperature=1.0) if not (e.reward and is_clean(e.states))]
        note(f"{who}: of the failures, sampled: those with a malformed message", mean(not is_clean(e.states) for e in failed))
        for s in (syntax, other):
            for point, value in zip(("the open tag", "the name's start", "the name's end"), knows(m, chat, tasks, s, limits)):
                note(f"{who}: teacher-forced, syntax {s}, calls right from {point} on", value)
    note("model, two rules (no end after <tool_call>, no <tool_call> inside text)", score(model, rule=two_rules(chat)))
    for name, ids in (("control tokens", control), ("JSON punctuation", token_classes(chat)["json"]),
                      ("the most frequent other tokens", others)):
        note(f"model, {name} decided by base", score(Swapped(model, base, ids)))
        note(f"base, {name} decided by model", score(Swapped(base, model, ids)))
    patched = copy.deepcopy(model)
    with torch.no_grad():
        patched.get_output_embeddings().weight[control] = base.get_output_embeddings().weight[control]
    note("model, output rows of the control tokens from base", score(patched))
    repair = lambda m, steps, *only: repaired(m, chat, train, syntax, limits, steps, sft_lr, score, *only)
    for steps in (1, 2, 4, 8, 16):
        note(f"model: after {steps} SFT steps", repair(model, steps))
    note("base: after 16 SFT steps", repair(base, 16))               # what SFT teaches besides
    torch.manual_seed(0)
    note("a model without any training, after 16 SFT steps", repair(AutoModelForCausalLM.from_config(base.config), 16))
    for steps in (4, 16):
        note(f"model: after {steps} SFT steps on control tokens only", repair(model, steps, set(control)))
    moved = (model.get_output_embeddings().weight - base.get_output_embeddings().weight).detach().norm(dim=-1)      # [V]
    for token in (OPEN, CLOSE, chat.text([chat.end_id])):
        note(f"drift of the output row of {token}, in medians of all rows", (moved[added[token]] / moved.median()).item())
    out["risers"] = risers(model, base, chat, truths(chat, tasks, syntax, limits))
    for token, before, after in out["risers"]:
        print(f"{after:8.3f}   mean probability of {token!r} where it does not belong; base {before:.4f}")
    return out


def probe_text(path, n_tasks=30):
    """The probe of any checkpoint on the embedded world's ground truth, as text: one line per class, one column per slot; * where that
    token is right"""
    model, chat, flags = load(path)
    syntax, limits = flags.get("syntax", "A"), Limits(20, 1024, 4096, 256)
    tasks = [t for c in CATEGORIES[:3] for t in make_tasks("test", c, -(-n_tasks // 3))][:n_tasks]
    p = probe(model, chat, truths(chat, tasks, syntax, limits))
    lines = [" " * 8 + "".join(f"{slot:>11s}" for slot in (*SLOTS, "off"))]
    for c in (*LEGAL, "json", "content"):
        lines.append(f"{c:8s}" + "".join(f"{p[f'p/{c}|{s}']:10.2e}{'*' if LEGAL.get(c) == s else ' '}" if f"p/{c}|{s}" in p else ""
                                         for s in (*SLOTS, "off")))
    return "\n".join(lines + [f"{name[2:]} {p[name]:.4g}" for name in ("p/short_circuit", "p/calls_exact", "p/log_likelihood")])


# ----------------------------------------------------------------------------------------------------------------------
# 6. Pictures. Readable in black and white: the states differ in hatching as well as in grey value, lines in their dashes.
FILLS = {"call": ("#1b5e9b", ""), "reply": ("#9ec9ea", ""), "polluted": ("#e08214", "///"), "collapsed": ("#7f3b08", "xx"),
         "empty": ("#cccccc", ".."), "cut": ("#666666", "--")}


def pyplot():
    import matplotlib                            # here, because training does not need it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"font.size": 8, "legend.frameon": False, "legend.fontsize": 7, "hatch.linewidth": 0.4}
    return plt


def draw(paths, png):
    """One column per run, one time axis: reward; shares of the message states, stacked; the open tag where text should begin,
    with the alarm; how far the model has moved. Dotted line: collapse. Grey band: the alarm is on."""
    plt = pyplot()
    fig, axes = plt.subplots(4, len(paths), figsize=(1 + 3.2 * len(paths), 7.6), sharex="col", sharey="row", squeeze=False,
                             height_ratios=[1, 1.4, 1, 0.8])
    for (top, middle, spike, far), path in zip(axes.T, paths):
        rows = read_rows(path)
        rolled, found = [r for r in rows if "reward" in r], collapse(rows) or collapse(rows, name="reward_clean")
        top.plot(*smooth(rows, "reward"), "k-", label="task reward")
        top.plot(*smooth(rows, "reward_clean"), "k--", lw=1, label="... and every message clean")
        middle.stackplot([r["step"] for r in rolled], [[r[f"state/{s}"] for r in rolled] for s in STATES], labels=STATES,
                         colors=[FILLS[s][0] for s in STATES], hatch=[FILLS[s][1] for s in STATES], edgecolor="white", lw=0.2)
        for ax, name in ((spike, "p/open|text"), (far, "p/moved")):
            ax.plot(*smooth(rows, name, 1), "k.-", lw=1)
        spike.set_yscale("log")
        alarm, last = {r["step"]: r["alarm"] for r in rows if "alarm" in r}, max(r["step"] for r in rows)
        for step, then in zip(alarm, [*list(alarm)[1:], last]):
            for ax in (top, spike) if alarm[step] else ():
                ax.axvspan(step, then, color="#dddddd", zorder=0)
        if phases := [r["step"] for r in rows if "sft_updates" in r]:
            top.plot(phases, [0] * len(phases), "k^", ms=4, clip_on=False)
        for ax in (top, middle, spike, far) if found else ():
            ax.axvline(found["step"], color="black", ls=":", lw=1.2)
        top.set_title(run_name(path) + "\n" + (f"collapse at step {found['step']}" if found else "no collapse"), fontsize=9)
        far.set_xlabel("step")
    for ax, label in zip(axes[:, 0], ("reward (mean of 5 steps)\n^ = an SFT phase", "share of messages",
                                      "P(<tool_call>)\nwhere text should begin", "mean change of log p\n(ground truth, nats)")):
        ax.set_ylabel(label)
    axes[0, 0].set_ylim(0, 1.4 * axes[0, 0].get_ylim()[1])            # room for the legend
    axes[0, 0].legend(loc="upper left")
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="lower center", ncol=len(STATES))
    fig.tight_layout(rect=(0, 0.03, 1, 1))
    fig.savefig(png, dpi=110)
    plt.close(fig)


def heat(path, png):
    """Control token x slot over time, log10 of the mean probability: black = certain, white = 1e-5 or less."""
    plt, rows = pyplot(), [r for r in read_rows(path) if "p/open|off" in r]
    fig, axes = plt.subplots(2, 3, figsize=(10, 4.6), sharex=True, sharey=True)
    names = {"open": OPEN, "close": CLOSE, "end": "<|im_end|>", "start": "<|im_start|>", "json": "JSON punctuation",
             "content": "content"}
    for ax, (c, title) in zip(axes.flat, names.items()):
        values = torch.tensor([[r.get(f"p/{c}|{slot}", 0.0) for r in rows] for slot in SLOTS]).clamp(min=1e-5).log10().numpy()
        image = ax.imshow(values, aspect="auto", cmap="Greys", vmin=-5, vmax=0, interpolation="nearest")
        ax.set_title(title + (f"  (right only in: {LEGAL[c]})" if LEGAL.get(c) else ""), fontsize=8)
        ax.set_yticks(range(len(SLOTS)), SLOTS)
        ax.set_xticks(range(0, len(rows), max(1, len(rows) // 5)), [r["step"] for r in rows[::max(1, len(rows) // 5)]])
    for ax in axes[1]:
        ax.set_xlabel("step")
    fig.colorbar(image, ax=axes, label="log10 of the mean probability")
    fig.suptitle(f"{run_name(path)}: what the model would say where, along the ground truth", fontsize=9)
    fig.savefig(png, dpi=110)
    plt.close(fig)


def pages(out, count=8):
    """Conversations of the run from first to last, as Markdown: every time the most malformed one that was kept of its step."""
    path = Path(out) / "episodes.jsonl"
    odd = lambda e: sum(s not in ("call", "reply") for s in e["states"]) / len(e["states"])
    worst = {e["step"]: e for e in sorted(read_rows(path), key=odd)}             # of each step the last one stays
    if not worst:
        raise UserError(f"{path} is empty: a run without RL steps has no conversations.")
    steps = sorted(worst)
    text = [f"# {Path(out).name}: conversations from the first step to the last"]
    for step in sorted({steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}):
        e = worst[step]
        said = "\n".join(line for line in e["text"].splitlines() if line.strip())
        text += [f"## step {step}: {e['task']}, reward {e['reward']:.0f}, messages: {', '.join(e['states'])}", f"```\n{said}\n```"]
    return "\n\n".join(text)


def main(argv=None):
    p = argparse.ArgumentParser(description="What happened in these runs? Without a flag: scores, states over time, verdict.")
    p.add_argument("runs", nargs="+", help="run folders, or their rows (metrics.jsonl, .csv)")
    p.add_argument("--transcripts", action="store_true", help="conversations from healthy to collapsed, as Markdown")
    p.add_argument("--plot", metavar="PNG", help="draw the runs side by side")
    p.add_argument("--heat", metavar="PNG", help="draw the first run's control tokens by slot over time")
    p.add_argument("--probe", action="store_true", help="control-token probabilities by slot, of run folders' newest checkpoints or "
                   "of any Hugging Face folder whose tokenizer has <tool_call>")
    p.add_argument("--autopsy", metavar="BASE", help="what exactly is broken in these runs' newest checkpoints, compared with the "
                   "model folder BASE (that they started from): minutes on two cores")
    p.add_argument("--autopsy_tasks", type=int, default=30, help="test tasks per category there")
    p.add_argument("--json", metavar="FILE", help="with --autopsy: write the numbers there too")
    a, status = p.parse_args(argv), 0
    drawn, found = [], {}
    for out in a.runs:
        try:
            if a.probe:
                print(f"== {out}", probe_text(out), sep="\n\n", end="\n\n")
            elif a.autopsy:
                print(f"== {out}")
                found[str(out)] = autopsy(out, a.autopsy, a.autopsy_tasks)
            elif a.plot or a.heat:
                for flag, needs, what in (("plot", "reward", "RL steps"), ("heat", "p/open|off", "probes (--probe_every)")):
                    if getattr(a, flag) and not any(needs in r for r in read_rows(out)):
                        raise UserError(f"{out} has no {what} to draw.")
                drawn.append(out)
            elif a.transcripts:
                print(pages(out), end="\n\n")
            else:
                print(f"== {out}", timeline(read_rows(out)), summary(out), sep="\n\n", end="\n\n")
        except UserError as error:                                   # say it, and go on with the other runs
            print(f"analyze_tokens.py: error: {error}", file=sys.stderr)
            status = 2
    if drawn and a.plot:
        draw(drawn, a.plot)
    if drawn and a.heat:
        heat(drawn[0], a.heat)
    if found and a.json:
        Path(a.json).write_text(json.dumps(found, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
