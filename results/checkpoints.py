"""results/checkpoints.py -- models of runs, looked at: the views of analyze_tokens.py that load them.

    python analyze_tokens.py --probe RUN                  on ground truth: probabilities by slot
    python analyze_tokens.py --spike RUN                  on the model's OWN rollouts: where messages begin
    python analyze_tokens.py --kl RUN                     how far from its starting model, over training
    python analyze_tokens.py --tokens RUN [--html FILE]   one conversation, token by token
    python analyze_tokens.py --transcripts RUN            conversations from healthy to collapsed

All but the last load its models and play the run's own world (its config.json says which), in float32, with
the plain sampler.

    1. load      a checkpoint with its run's flags; the world as the run plays it
    2. probe     3. spike, KL     4. token by token     5. conversations over time
"""
import html
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

import train
from analyze_tokens import (mean, newest_checkpoint, pretrained, probe, read_json, read_records,
                            timeline, verified)
from rl_step import kl_penalty
from rollout import (OPEN, Chat, Episode, HFEngine, begin, conversations_that_fit, demonstrate, is_clean,
                     rollout)
from sft_step import micro_batches, token_logprobs
from tools import TRAIN_CATEGORIES, WORLDS, UserError

KV_CACHE_GB = {"cpu": 2, "cuda": 20}             # of the sampler

# ------------------------------------------------------------------------------------------------------------
# 1. A checkpoint, and the world that its run plays


@dataclass
class Checkpoint:
    model: object
    chat: Chat
    args: object                                 # the run's flags; of a folder without a run: train.py's own
    run: Path | None                             # the run's folder

    def start(self):
        """-> the model that the run started from"""
        if not self.run:
            raise UserError("only a run folder tells which model it started from (config.json); name one.")
        name, template = train.starting_point(self.args), self.args.chat_template
        return on_device(pretrained(name, template=template)[0])


def load(path, world="tiny"):
    """A run folder (its newest checkpoint), RUN/checkpoints/step-N, or a Hugging Face folder -> Checkpoint"""
    path, run = Path(path), None
    for folder in (path, *path.parents[:2]):
        if run is None and (folder / "config.json").exists() and (folder / "metrics.jsonl").exists():
            run = folder
    name = newest_checkpoint(run) if path == run else path
    if not name:
        raise UserError(f"{path} has no checkpoint yet; name another run, or a Hugging Face folder.")
    config = read_json(run / "config.json") if run else {}
    if config.get("world", world) not in train.WORLDS:
        raise UserError(f"{run} plays --world {config['world']}, which this program does not know.")
    args = train.parse_args(["--eval_only", "--world", config.get("world", world), "--model", str(path)])
    vars(args).update(config)                    # flags that are newer than the run keep their defaults
    if args.chat_template:                       # of a file its checksum was written behind the name
        args.chat_template = args.chat_template.split(" (checksum ")[0]
    hf_logging.disable_progress_bar()
    model, chat = pretrained(verified(name), template=args.chat_template)
    return Checkpoint(on_device(model), chat, args, run)


def on_device(model):
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class World:
    """The tasks, and how the run plays them"""
    chat: Chat
    syntax: str
    closing: str
    limits: object
    test: list                                   # to play
    train: list                                  # to repair with
    slots: int                                   # conversations at a time

    @property
    def other(self):
        """The syntax that the run was not trained in"""
        return "B" if self.syntax == "A" else "A"

    def play(self, model, syntax=None, temperature=0.0, rule=None):
        """-> the test tasks as Episodes"""
        engine, envs = HFEngine(model, self.chat.stop_ids, self.slots, self.limits.total_tokens), []
        engine.rule = rule
        for task in self.test:
            envs.append(task.env(syntax or self.syntax, self.closing))
        begun = [begin(self.chat, env, g) for g, env in enumerate(envs)]
        return rollout(engine, self.chat, envs, self.limits, begun, seed=(0,), temperature=temperature)

    def score(self, model, **how):
        """-> the clean reward"""
        return mean(e.reward * is_clean(e.states) for e in self.play(model, **how))

    def truths(self, tasks, syntax=None):
        """-> the ground truth of the tasks as Episodes, whole: nothing is sampled, so no limit need cut it"""
        wide = replace(self.limits, messages=10**3, total_tokens=10**6)
        return [demonstrate(self.chat, task, syntax or self.syntax, wide) for task in tasks]


def world_of(found, n_tasks):
    """A Checkpoint -> its World, with n_tasks test tasks per training category"""
    args, test, train_tasks = found.args, [], []
    world = WORLDS[args.world](args)
    for category in TRAIN_CATEGORIES:
        test += world.tasks("test", category, n_tasks)
        train_tasks += world.tasks("train", category, 100)
    room = KV_CACHE_GB[found.model.device.type]
    slots = conversations_that_fit(found.model.config, args.max_total_tokens, room, "float32")
    return World(found.chat, args.syntax, args.closing, train.limits_of(args), test, train_tasks, slots)


# ------------------------------------------------------------------------------------------------------------
# 2. The probe, as a table


SLOTS = ("call", "text", "open", "in_call", "in_text", "close", "last")
RIGHT = {"open": "call", "close": "close", "end": "last", "start": None}


def probe_text(path, how):
    """One line per control token, one column per slot; * where that token is right"""
    found = load(path, how.world)
    world = world_of(found, how.tasks)
    p = probe(found.model, found.chat, world.truths(world.test), found.args.micro_tokens)
    lines = [" " * 8 + "".join(f"{slot:>11s}" for slot in (*SLOTS, "off"))]
    for c in RIGHT:
        cells = [f"{c:8s}"]
        for slot in (*SLOTS, "off"):
            if f"p/{c}|{slot}" in p:
                cells.append(f"{p[f'p/{c}|{slot}']:10.2e}{'*' if RIGHT.get(c) == slot else ' '}")
        lines.append("".join(cells))
    for name in ("short_circuit", "calls_exact", "log_likelihood"):
        lines.append(f"{name} {p[f'p/{name}']:.4g}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# 3. On the model's own rollouts. The paper looks there: at the message's beginning, and behind a tag and a
#    newline, where `{"` is right and the end token is the collapsed message.
PLACES = {"start": "where a message begins", "tag": f"right after a message's {OPEN}",
          "newline": f"after {OPEN} and a newline"}


def beginnings(chat, row):
    """An Episode -> {position: "start" | "tag" | "newline"}

        Done . <|im_end|>     <tool_call> \\n  {"      .. <|im_end|>
        start                 start       tag newline"""
    found = {}
    for span in row.spans:
        if span.who == "model":
            said = row.ids[span.start:span.end]
            found[span.start] = "start"
            if said[0] == chat.open_id and len(said) > 1:
                found[span.start + 1] = "tag"
                if chat.text(said[1:2]) == "\n" and len(said) > 2:
                    found[span.start + 2] = "newline"
    return found


def watched_tokens(chat):
    """-> {"<tool_call>": 3, "<|im_end|>": 2, '{"': 17}"""
    brace, = chat.tokenizer('{"', add_special_tokens=False)["input_ids"][:1]
    return {OPEN: chat.open_id, chat.text([chat.end_id]): chat.end_id, '{"': brace}


@dataclass
class Score:
    """What a model says about one token that the assistant said"""
    row: object
    position: int
    logp: float                                  # of that token
    watched: list                                # probability of each watched token in its place


@torch.no_grad()
def scores(model, rows, micro_tokens, watch):
    """-> [Score] of every token of the rows with mask 1"""
    found = []
    for batch in micro_batches(rows, micro_tokens):
        scored = token_logprobs(model, batch, watch=watch)
        trained = [(row, t) for row in batch for t, m in enumerate(row.mask) if m]
        values = zip(scored.logp.tolist(), scored.watched.tolist())
        found += [Score(row, t, logp, p) for (row, t), (logp, p) in zip(trained, values, strict=True)]
    return found


def own_tokens(chat, found):
    """[Score] -> mean probabilities, {"start": {"n": 60, "<tool_call>": .41, ...}, "tag": ..., ...}"""
    watch, at = watched_tokens(chat), {place: [] for place in PLACES}
    places = {id(s.row): beginnings(chat, s.row) for s in found}
    for score in found:
        if place := places[id(score.row)].get(score.position):
            at[place].append(score.watched)
    table = {}
    for place, values in at.items():
        columns = zip(*values) if values else [[]] * len(watch)
        table[place] = {"n": len(values)} | {token: mean(p) for token, p in zip(watch, columns)}
    return table


def as_trained(found):
    """-> the Checkpoint, if its rollouts were sampled behind the very tokens that they are scored behind"""
    if found.chat.sampler_only:
        raise UserError(f"with --chat_template {found.args.chat_template} messages are sampled behind tokens "
                        "that the trained text lacks: no probabilities to compare here; use --probe.")
    return found


def kl_to(found):
    """[Score] of rollouts by another model -> KL(who sampled || that model) per token: the mean of k3"""
    sampled = torch.tensor([s.row.logprobs[s.position] for s in found])
    return kl_penalty(sampled, torch.tensor([s.logp for s in found])).mean().item()


def spike_text(path, how):
    """Before and after: each of the two models on rollouts of its own, at temperature 1, of the same tasks"""
    found = as_trained(load(path))
    start, world, watch = found.start(), world_of(found, how.tasks), watched_tokens(found.chat)
    then = world.play(start, temperature=1.0)
    now = world.play(found.model, temperature=1.0)
    measure = lambda model, rows: scores(model, rows, found.args.micro_tokens, watch.values())
    before, after = (own_tokens(found.chat, measure(*pair)) for pair in ((start, then), (found.model, now)))
    lines = [f"{len(then)} test tasks, played at temperature 1 by the starting model -> by the newest one"]
    for place, meaning in PLACES.items():
        lines.append(f"{meaning} ({before[place]['n']} -> {after[place]['n']} times)")
        for token in watch:
            cells = [f"{of[place][token]:.4f}" if of[place]["n"] else "  -   " for of in (before, after)]
            lines.append(f"  {' -> '.join(cells)}   P({token})")
    malformed = [mean(not is_clean([s]) for e in rows for s in e.states) for rows in (then, now)]
    lines.append("{:.4f} -> {:.4f}   malformed messages".format(*malformed))
    lines.append(f"{kl_to(measure(start, now)):.4f} nats per token   KL(newest || starting model), k3")
    return "\n".join(lines)


def kl_text(path, how):
    """How far has the policy moved, with or without a KL loss? The run has kept a few rollouts of every step
    with their log-probabilities; here the starting model scores them. One number per step -> RUN/kl.jsonl

    (The best, the worst and a malformed rollout are kept, no fair sample: read the curve, not its height.)"""
    found = as_trained(load(path))
    start, rows, lines = found.start(), {}, []
    for record in recorded(found):
        if record["source"] == "policy":         # a hint, or ground truth, was not the policy's own
            rows.setdefault(record["step"], []).append(episode_of(record))
    for step in rows:
        kl = kl_to(scores(start, rows[step], found.args.micro_tokens, []))
        lines.append(json.dumps({"step": step, "kl_start": kl}) + "\n")
    train.write_atomically(found.run / "kl.jsonl", "".join(lines))
    return timeline(read_records(found.run))


def recorded(found):
    """-> the records of a run's episodes.jsonl, with token ids"""
    path = found.run / "episodes.jsonl"
    records = read_records(path) if path.exists() else []
    if not records or "ids" not in records[-1]:
        raise UserError(f"{path} has no rollouts with token ids; name a run that has RL steps, and is newer.")
    return records


def episode_of(record):
    """A record of episodes.jsonl -> the Episode: tokens, log-probabilities, spans, states"""
    episode, said = Episode(record["task"], record["group"], record["sample"], record["source"]), 0
    for start, end, who, turn, state in record["spans"]:
        logprobs = None
        if who == "model":                       # its tokens alone have one
            logprobs = record["logprobs"][said:said + end - start]
            said += end - start
        episode.append(record["ids"][start:end], who, turn, logprobs, state=state)
    return episode


# ------------------------------------------------------------------------------------------------------------
# 4. Token by token: where does the spike sit? Each message twice, as the starting model and as the newest
#    checkpoint see it: red = P(<tool_call>) in the place of that token, blue = P(end token) there.
SHOWN = 300                                      # characters of what others say, in the terminal
LEGEND = (f"Red: P({OPEN}) in the place of the token. Blue: P(end token) there. White: .001 and less, full "
          "colour: 1. start: the model that the run started from; now: its newest checkpoint.")


@dataclass
class Cell:
    text: str                                    # '<tool_call>'
    logp: float                                  # of the token itself
    open: float                                  # probability of <tool_call> in its place
    end: float                                   # ... of the end token


def tokens_text(path, how):
    """One conversation, before and after: for the terminal; or, with --html, written there"""
    found = load(path, how.world)
    title, row = conversation(found, how)
    models = {"now": found.model} | ({"start": found.start()} if found.run else {})
    messages = {who: cells(found, model, row) for who, model in sorted(models.items(), reverse=True)}
    if not how.html:
        return "\n".join([title, terminal(found.chat, row, messages)])
    Path(how.html).write_text(page(found.chat, row, messages, title))
    return f"{title}\nwritten to {how.html}"


def conversation(found, how):
    """-> a title, and the Episode: the ground truth of a test task; with --step of that step's recorded
    rollouts the one with most malformed messages"""
    if how.step is None:
        world = world_of(found, 1)
        return f"{world.test[0].id}, ground truth", world.truths(world.test[:1])[0]
    if not found.run:
        raise UserError(f"--step {how.step} is of a run's recorded rollouts, and {how.runs[0]} is no run.")
    step, records = how.step, [record for record in recorded(found) if record["step"] == how.step]
    if not records:
        raise UserError(f"--step {step} has no recorded rollout; see {found.run / 'episodes.jsonl'}.")
    worst = max(records, key=lambda r: mean(not is_clean([s]) for s in r["states"]))
    states = ", ".join(worst["states"])
    title = f"step {step}: {worst['task']}, reward {worst['reward']:.0f}, messages: {states}"
    return title, episode_of(worst)


def cells(found, model, row):
    """-> {position: Cell} of every token that the assistant said"""
    seen = scores(model, [row], found.args.micro_tokens, [found.chat.open_id, found.chat.end_id])
    return {s.position: Cell(found.chat.text([row.ids[s.position]]), s.logp, *s.watched) for s in seen}


def colour(cell):
    """Cell("Done", -1.0, open=1.0, end=.001) -> (255, 64, 64), red; both high: purple. The scale counts
    factors: white up to .001, half at .03, full at 1."""
    shade = lambda p: min(1.0, max(0.0, 1 + math.log10(max(p, 1e-9)) / 3))
    red, blue = shade(cell.open), shade(cell.end)
    return (round(255 * (1 - 0.75 * blue)), round(255 * (1 - 0.75 * max(red, blue))),
            round(255 * (1 - 0.75 * red)))


def terminal(chat, row, messages):
    """As text with ANSI colours (24 bits)"""
    lines = [LEGEND]
    for span in row.spans:
        if span.who != "model":
            said = chat.text(row.ids[span.start:span.end]).strip()
            said = said if len(said) <= SHOWN else f"... {said[-SHOWN:]}"
            lines.append(f"\033[2m{span.who}  {said}\033[0m")
            continue
        for who, found in messages.items():
            line = f"{who:5s} [{span.state}]  "
            for t in range(span.start, span.end):
                shown = found[t].text.replace("\n", "\\n")
                line += "\033[30;48;2;{};{};{}m".format(*colour(found[t])) + f"{shown}\033[0m"
            lines.append(line)
        lines += misplaced(messages, span, chat.text([chat.end_id]))
    return "\n".join(lines)


def misplaced(messages, span, end):
    """-> lines such as "      P(<tool_call>) 0.05 -> 0.48 in the place of 'Done'": wherever one of the two
    became likely, and another token is right"""
    before, after = next(iter(messages.values())), messages["now"]
    lines = []
    for t in range(span.start, span.end):
        for token, name in ((OPEN, "open"), (end, "end")):
            first, last = getattr(before[t], name), getattr(after[t], name)
            if after[t].text != token and last >= 0.25 and last > 2 * first:
                lines.append(f"      P({token}) {first:.2g} -> {last:.2g} in the place of {after[t].text!r}")
    return lines


STYLE = """body { font: 14px/1.7 monospace; margin: 2em; max-width: 72em }
.other { color: #777; white-space: pre-wrap }
.model { margin: .6em 0; padding-left: .6em; border-left: 3px solid #999 }
.who { color: #777; display: inline-block; min-width: 11em }
.t { border: 1px solid #ddd; white-space: pre }
.t:hover { outline: 2px solid black }"""


def page(chat, row, messages, title):
    """As a page that needs nothing else; under the mouse every token tells its numbers"""
    parts = [f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>',
             f"<style>{STYLE}</style><h3>{html.escape(title)}</h3>", f"<p>{html.escape(LEGEND)}</p>"]
    for span in row.spans:
        if span.who != "model":
            said = html.escape(chat.text(row.ids[span.start:span.end]).strip())
            if span.who == "prompt":
                said = f"<details><summary>prompt</summary>{said}</details>"
            parts.append(f'<div class="other">{said}</div>')
            continue
        parts.append('<div class="model">')
        told = {t: told_by(messages, t) for t in range(span.start, span.end)}
        for who, found in messages.items():
            line = f'<span class="who">{who} [{span.state}]</span>'
            for t in told:
                shown = html.escape(found[t].text.replace("\n", "\\n"))
                line += (f'<span class="t" style="background: rgb{colour(found[t])}" '
                         f'title="{html.escape(told[t])}">{shown}</span>')
            parts.append(f"<div>{line}</div>")
        parts.append("</div>")
    return "\n".join(parts) + "\n"


def told_by(messages, t):
    """-> "start: P(<tool_call>) 0.02, P(end) 0.01, P(this token) 0.9", a line per model"""
    lines = []
    for who, found in messages.items():
        cell = found[t]
        lines.append(f"{who}: P({OPEN}) {cell.open:.2g}, P(end) {cell.end:.2g}, "
                     f"P(this token) {math.exp(cell.logp):.2g}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# 5. Conversations over time, as they were recorded


def pages(out, how, count=8):
    """Conversations from first to last, as Markdown: of a step the most malformed one that was kept"""
    path = Path(out) / "episodes.jsonl"
    malformed = lambda e: sum(not is_clean([s]) for s in e["states"]) / len(e["states"])
    worst = {e["step"]: e for e in sorted(read_records(path), key=malformed)}  # of each step the last stays
    if not worst:
        raise UserError(f"{path} is empty: a run without RL steps has no conversations.")
    steps = sorted(worst)
    text = [f"# {Path(out).name}: conversations from the first step to the last"]
    for step in sorted({steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}):
        e = worst[step]
        said = "\n".join(line for line in e["text"].splitlines() if line.strip())
        states = ", ".join(e["states"])
        text.append(f"## step {step}: {e['task']}, reward {e['reward']:.0f}, messages: {states}")
        text.append(f"```\n{said}\n```")
    return "\n\n".join(text)


VIEWS = {"probe": probe_text, "spike": spike_text, "kl": kl_text, "tokens": tokens_text, "transcripts": pages}
