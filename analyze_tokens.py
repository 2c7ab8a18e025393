"""analyze_tokens.py -- what a run logs, and how to read it: token probabilities, states, verdict.

    python analyze_tokens.py runs/a runs/b               scores, states over time and the verdict of each run
    python analyze_tokens.py --transcripts runs/a        conversations from healthy to collapsed
    python analyze_tokens.py --probe runs/a              control tokens by slot, on ground truth
    python analyze_tokens.py --spike runs/a              ... on its own rollouts, before and after
    python analyze_tokens.py --kl runs/a                 KL to its starting model over training
    python analyze_tokens.py --tokens runs/a [--html a.html]         one conversation, token by token

All but the first: results/checkpoints.py. Pictures: results/plot.py. What is broken: results/autopsy.py.
"""
import argparse
import fcntl
import json
import os
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout import STATES, TEMPLATES, Chat, is_clean
from sft_step import micro_batches, rank, token_logprobs
from tools import WORLDS, UserError

# ------------------------------------------------------------------------------------------------------------
# 1. Records: what a run has logged, one dict per line of metrics.jsonl
# What reading records raises that no run has written: a metric that is a text, or is not there.
DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)


def mean(values):
    """[1, 2] -> 1.5, [] -> 0.0"""
    values = list(values)
    return sum(values) / max(len(values), 1)


def read_records(out):
    """A run folder, a metrics.jsonl, or a study's CSV (merged by step) -> [{"step": 0, "reward": .1, ...}]
    A last line that was cut in the middle (the run goes on, or was killed) is left out."""
    path = Path(out) if str(out).endswith((".jsonl", ".csv")) else Path(out) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder, or a metrics.jsonl.")
    lines, records, is_csv = path.read_bytes().splitlines(), [], path.suffix == ".csv"
    for i in range(1 if is_csv else 0, len(lines)):
        try:
            record = read_cells(lines[0], lines[i]) if is_csv else json.loads(lines[i].decode())
            if type(record["step"]) is not int:
                raise TypeError("the step is not a whole number")
            records.append(record)
        except (*DAMAGE, RecursionError) as error:
            if is_csv or i < len(lines) - 1 or not isinstance(error, ValueError):
                raise UserError(f"line {i + 1} of {path} is damaged; delete it to read the rest "
                                f"({error!r}).") from error
    if Path(out).is_dir() and (Path(out) / "kl.jsonl").exists():
        records += read_records(Path(out) / "kl.jsonl")              # what --kl has measured
    return records


def read_cells(header, line):
    """b"step,reward,lr,phase", b"3,0.5,,rl" -> {"step": 3, "reward": 0.5, "phase": "rl"}"""
    kind = lambda name, text: str if name == "phase" else int if text.lstrip("-").isdigit() else float
    cells = zip(header.decode().split(","), line.decode().split(","), strict=True)
    return {name: kind(name, text)(text) for name, text in cells if text}


def log_line(path, record, wandb=None):
    """One more line; and, with train.py's --wandb, the same there"""
    if rank() == 0:
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}
        with open(path, "a") as f:
            f.write(json.dumps(rounded) + "\n")
        if wandb:
            wandb.log(rounded, step=record["step"])


def smooth(records, name, window=5):
    """-> steps, mean of the metric over the last `window` records that have it"""
    records = [r for r in records if name in r]
    values = [mean(r[name] for r in records[max(0, i + 1 - window):i + 1]) for i in range(len(records))]
    return [r["step"] for r in records], values


# ------------------------------------------------------------------------------------------------------------
# 2. Slots. In ground truth it is known what is right at every place. So each place where the assistant speaks
#    is a slot, and each control token is right in ONE kind of slot:
#      call     the first token of a message that should be a call    right: <tool_call>
#      text     the first token of a message that should be text      <tool_call> here is the paper's spike
#      open     right after <tool_call>                              the end token here: the collapsed message
#      in_call  inside a call      in_text  inside a text
#      close    where a call should close                             right: </tool_call>
#      last     where the message should end                          right: the end token
#    <|im_start|> is never right; in syntax B, neither are the tags.


@dataclass
class Place:
    position: int  # of the token there; the logits that predict it stand one before
    token: int
    slot: str
    is_call: bool                                # the message is a call


def places(chat, row):
    """A ground-truth Episode -> [Place] of every token that the assistant says.

      <tool_call> \\n   {"    .. }}      \\n      </tool_call> <|im_end|>         Done . <|im_end|>
      call        open in_call .. in_call in_call close        last              text in_text last"""
    found = []
    for span in [span for span in row.spans if span.who == "model"]:
        is_call = span.state == "call"
        for t in range(span.start, span.end):
            slot = "in_call" if is_call else "in_text"               # each line below overrides those above
            if row.ids[t - 1] == chat.open_id:
                slot = "open"
            if row.ids[t] == chat.close_id:
                slot = "close"
            if t == span.end - 1:
                slot = "last"
            if t == span.start:
                slot = "call" if is_call else "text"
            found.append(Place(t, row.ids[t], slot, is_call))
    return found


# ------------------------------------------------------------------------------------------------------------
# 3. The probe: ground-truth conversations that never change, one forward pass, no sampling. A moving number
#    is the model's doing alone.


def watched_ids(chat):
    """-> {"open": 3, "close": 4, "end": 2, "start": 1}: the control tokens that are looked at"""
    ids = {"open": chat.open_id, "close": chat.close_id, "end": chat.end_id}
    start = chat.control_ids().get("<|im_start|>")
    return ids if start is None else ids | {"start": start}


@torch.no_grad()
def probe(model, chat, rows, micro_tokens=16_384, start=None):
    """Ground-truth Episodes -> {"p/open|text": .012, "p/end|open": .001, "p/short_circuit": ..., ...}

      p/TOKEN|SLOT      mean probability of the token (open, close, end, start) in such slots:
                        p/open|text  is P(<tool_call>) where text should begin; p/open|call is healthy near 1
      p/TOKEN|off       the same over ALL places where another token is right
      p/short_circuit   p/open|text * p/end|open, a stand-in for the probability of the collapsed message (no
                        ground truth has a tag in a place for text: the second factor is of calls)
      p/calls_exact     share of ground-truth calls whose every token is the model's first choice: can it
                        still use tools? (The first token is given: calling at all is p/open|call.)
      p/log_likelihood  mean log p of the ground truth
      p/moved           mean |log p - log p_start|; start: truth_logprobs of the model at the run's start"""
    model.eval()
    watch, total, exact, log_likelihood = watched_ids(chat), {}, [], []
    for batch in micro_batches(rows, micro_tokens):
        scored = token_logprobs(model, batch, watch=watch.values())
        log_likelihood += scored.logp.tolist()
        where = [place for row in batch for place in places(chat, row)]
        columns = zip(where, scored.first_choice.tolist(), scored.watched.tolist(), strict=True)
        for place, is_first, probabilities in columns:
            for name, p in zip(watch, probabilities):
                total.setdefault(f"p/{name}|{place.slot}", []).append(p)
                if place.token != watch[name]:
                    total.setdefault(f"p/{name}|off", []).append(p)
            if place.slot == "call":             # its first token is given; from there on all must be right
                exact.append(True)
            elif place.is_call:
                exact[-1] = exact[-1] and is_first
    metrics = {name: mean(values) for name, values in total.items()}
    if start:
        pairs = zip(log_likelihood, start, strict=True)
        metrics["p/moved"] = mean(abs(now - before) for now, before in pairs)
    return metrics | {"p/short_circuit": metrics["p/open|text"] * metrics.get("p/end|open", 0.0),
                      "p/calls_exact": mean(exact), "p/log_likelihood": mean(log_likelihood)}


@torch.no_grad()
def truth_logprobs(model, rows, micro_tokens=16_384):
    """-> log p of every token that the assistant says in `rows`, in probe's order"""
    logprobs = []
    for batch in micro_batches(rows, micro_tokens):
        logprobs += token_logprobs(model, batch).logp.tolist()
    return logprobs


# ------------------------------------------------------------------------------------------------------------
# 4. States


def rollout_metrics(episodes, credit):
    """All ranks' Episodes and what each was credited with -> the metrics of one batch of rollouts. Ground
    truth and hinted rollouts count for mixed_groups only, since they take part in the advantage."""
    groups = {}
    for e, c in zip(episodes, credit, strict=True):
        groups.setdefault(e.group_id, set()).add(c)
    mixed = mean(len(credits) > 1 for credits in groups.values())    # the others teach nothing
    own = [e for e in episodes if e.source == "policy"]
    states, status = Counter(s for e in own for s in e.states), Counter(e.status for e in own)
    n = max(states.total(), 1)
    return {"reward": mean(e.reward for e in own), "mixed_groups": mixed,
            "reward_clean": mean(e.reward * is_clean(e.states) for e in own),
            **{f"state/{s}": states[s] / n for s in STATES},
            "no_call": mean("call" not in e.states for e in own),
            "messages": states.total() / len(own), "message_tokens": sum(sum(e.mask) for e in own) / n,
            **{f"status/{s}": count / len(own) for s, count in sorted(status.items())}}


# ------------------------------------------------------------------------------------------------------------
# 5. Collapse
WINDOW = 5                                       # steps that the reward is averaged over
MEASURES = {"reward": "task reward (the paper's measure)",
            "reward_clean": "clean reward (solved, every message a complete call or plain text)"}


def collapse(records, name="reward", share=0.1):
    """Did the reward collapse, and what had the messages become? From the records that have a reward.
    -> {"step": 65, "peak": .31, "peak_step": 40, "before": {state: share at the peak}, "after": {...}}
    Collapse = the mean reward over WINDOW steps falls below `share` of its peak and stays there."""
    records = [r for r in records if name in r]
    if len(records) < 2 * WINDOW:
        return None
    _, values = smooth(records, name, WINDOW)
    top = max(range(WINDOW - 1, len(records)), key=values.__getitem__)
    first = len(records)                         # walk back from the end, as long as the reward is low
    while first > top and values[first - 1] < share * values[top]:
        first -= 1
    if first == len(records):
        return None
    shares = {s: smooth(records, f"state/{s}", WINDOW)[1] for s in STATES}
    return {"step": records[first]["step"], "peak": values[top], "peak_step": records[top]["step"],
            "before": {s: values[top] for s, values in shares.items()},
            "after": {s: values[-1] for s, values in shares.items()}}


# ------------------------------------------------------------------------------------------------------------
# 6. Texts


def one_line(record):
    """-> "step    3  rl   reward 0.250  mixed 0.42  |  call 0.50  ..  |  entropy 0.310  grad 0.52  1.4 s" """
    formats = {"reward": "reward {:.3f}", "mixed_groups": "mixed {:.2f}  |",
               **{f"state/{s}": s + " {:.2f}" for s in STATES}, "entropy": "|  entropy {:.3f}",
               "sft_updates": "{} SFT updates", "sft_rows": "{} rows", "sft_loss": "sft_loss {:.3f}",
               "grad_norm": "grad {:.2f}", "seconds": "{:.1f} s"}
    parts = [text.format(record[name]) for name, text in formats.items() if name in record]
    return "  ".join([f"step {record['step']:4d}", f"{record['phase']:3s}", *parts])


def table(columns):
    """{"before": {"base": .1}, "after": {"base": .3}} -> a text table, one line per score"""
    lines = [" " * 20 + "".join(f"{c:>10s}" for c in columns)]
    for name in next(iter(columns.values())):
        lines.append(f"{name:20s}" + "".join(f"{100 * column[name]:9.1f}%" for column in columns.values()))
    return "\n".join(lines)


def summary(out):
    """What a run did, as text: scores before and after, and whether it collapsed. The run may still go on."""
    records = read_records(out)
    evals = [r for r in records if "eval/average" in r]
    tests = [r for r in records if "test/average" in r]              # --world bfcl: played once, at the end
    scores = lambda r, of: {name[5:]: value for name, value in r.items() if name.startswith(of)}
    text = []
    if evals:
        text.append(table({"before": scores(evals[0], "eval/"), "after": scores(evals[-1], "eval/")}))
    if tests:
        text.append(table({"test": scores(tests[-1], "test/")}))
    found = {name: collapse(records, name=name) for name in MEASURES}
    event = found["reward"] or found["reward_clean"]
    first, last = [evals[i]["eval/average_clean"] for i in (0, -1)] if evals else (0, 0)
    tests_lost = first > 0.2 and last < first / 4        # a few solved tasks could be lost by chance
    if event or tests_lost:
        text.append("\nCOLLAPSE (5 steps' mean below a tenth of its peak, for good; tests: below a quarter):")
        for name, meaning in MEASURES.items():
            one, (_, values) = found[name], smooth(records, name)
            if not values:                       # SFT alone
                continue
            what = "at step {step}, peak {peak:.2f} at step {peak_step}".format(**one) if one else "no"
            text.append(f"  by the {meaning}: {what}; last 5 steps {values[-1]:.2f}")
        text.append(f"  by the test tasks, solved with clean messages: {first:.1%} -> {last:.1%}")
        if event:
            shift = ", ".join(f"{s} {event['before'][s]:.2f} -> {event['after'][s]:.2f}" for s in STATES)
            text.append(f"What the messages became: {shift}.")
        if event and not found["reward"]:
            text.append("The task reward does not see it: with --closing lenient any message without a "
                        "complete call ends the turn.")
    elif 0 < sum("reward" in r for r in records) < 2 * WINDOW:
        text.append(f"\nToo short to tell whether it collapses: fewer than {2 * WINDOW} RL steps.")
    elif any("reward" in r for r in records):
        text.append("\nNo collapse: neither reward nor clean reward fell below a tenth of its peak for good.")
        if last < 0.8 * first:
            text.append(f"But the test tasks fell from {first:.0%} to {last:.0%}.")
    if skipped := sum(r.get("skipped_updates", 0) for r in records):
        text.append(f"{skipped} update(s) were skipped because a loss or gradient was not finite.")
    probes = [r for r in records if "p/open|text" in r]
    if len(probes) > 1:
        meanings = {"p/open|text": "P(<tool_call> where text should begin)",
                    "p/end|open": "P(end right after <tool_call>)",
                    "p/calls_exact": "ground-truth calls that are the model's first choice, token by token"}
        for name, meaning in meanings.items():
            if name in probes[0]:                # syntax B has no tag to end behind
                text.append(f"{probes[0][name]:.4f} -> {probes[-1][name]:.4f}   {meaning}")
    return "\n".join(text)


def timeline(records, points=12):
    """The run over time: at most `points` lines, each the mean of its stretch of steps."""
    names = {"reward": "reward", "clean": "reward_clean", **{s: f"state/{s}" for s in STATES},
             "open|text": "p/open|text", "end|open": "p/end|open", "exact": "p/calls_exact"}
    for short, name in {"moved": "p/moved", "kl_ref": "kl_ref", "kl_start": "kl_start"}.items():
        found = [r[name] for r in records if name in r]
        if any(found) or (found and name != "kl_ref"):               # 0: there is no reference model
            names[short] = name
    steps = [r["step"] for r in records if "reward" in r]
    size = max(1, -(-len(steps) // points))
    first, lines = 0, [" ".join(f"{name:>9s}" for name in ("steps", *names))]
    # A stretch ends where the next one begins: no SFT phase between RL steps, and no last probe, is left out
    for after in [*steps[size::size], max(r["step"] for r in records) + 1] if steps else []:
        cells = [f"{first:4d}-{after - 1:<4d}"]
        for name in names.values():
            values = [r[name] for r in records if first <= r["step"] < after and name in r]
            cells.append(f"{mean(values):9.4f}" if values else " " * 9)
        lines.append(" ".join(cells))
        first = after
    return "\n".join(lines)


def transcript(chat, episode):
    """For reading: a paragraph per span, the model's with state: 'model[call]  <tool_call>...<|im_end|>' """
    lines = []
    for s in episode.spans:
        state = f"[{s.state}]" if s.state else ""
        lines.append(f"{s.who}{state}  {chat.text(episode.ids[s.start:s.end])}")
    return "\n".join(lines)


def record_episodes(path, step, chat, episodes):
    """Of a step's Episodes keep what one wants to read: best, worst, and one with a malformed message"""
    by_reward = sorted(episodes, key=lambda e: e.reward)
    malformed = [e for e in episodes if not is_clean(e.states)]
    for e in {id(e): e for e in [by_reward[-1], by_reward[0], *malformed[:1]]}.values():
        said = [round(logp, 4) for logp, trained in zip(e.logprobs, e.mask) if trained]
        log_line(path, {
            "step": step, "task": e.task_id, "group": e.group_id, "sample": e.sample, "source": e.source,
            "reward": e.reward, "status": e.status, "failed_turn": e.failed_turn, "states": e.states,
            "text": transcript(chat, e), "ids": e.ids, "logprobs": said,         # of the model's tokens
            "spans": [[s.start, s.end, s.who, s.turn, s.state] for s in e.spans]})


# ------------------------------------------------------------------------------------------------------------
# 7. The folder of a run: checkpoints, the lock; loading a model


def read_json(path):
    """The dict in a file that a run wrote"""
    try:
        return {**json.loads(Path(path).read_bytes())}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}).") from error


def saved_steps(out):
    """-> [25, 50], of the checkpoints that are there; complete ones: they get their names last"""
    names = [path.name[5:] for path in (Path(out) / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def newest_checkpoint(out):
    """runs/x -> runs/x/checkpoints/step-50, verified; None if there is none. `latest` names it. Without one
    (the run was killed just before its first, or the file is lost) it is the one of the last step."""
    folder, steps = Path(out) / "checkpoints", saved_steps(out)
    if (folder / "latest").is_file():
        path = folder / (folder / "latest").read_text(errors="replace").strip()
    elif steps:
        path = folder / f"step-{steps[-1]}"
    else:
        return None
    if not (path / "MANIFEST.json").is_file():
        raise UserError(f"the checkpoint {path} is missing; write an older step-N into {folder / 'latest'}.")
    return verified(path)


def verified(path):
    """A folder, checked file by file if it has a MANIFEST.json -> the same"""
    manifest = Path(path) / "MANIFEST.json"
    for name, size_and_sum in (read_json(manifest) if manifest.is_file() else {}).items():
        file = manifest.parent / name
        if not file.is_file() or [file.stat().st_size, checksum(file)] != size_and_sum:
            raise UserError(f"the file {file} is damaged; use another checkpoint (to resume, write an older "
                            f"step-N into {manifest.parent.parent / 'latest'}).")
    return path


def checksum(path):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def world_checksum():
    """Of what the embedded world says: a base that learned other texts is lost in it"""
    texts = []
    for task in WORLDS["tiny"](None).mixed("train", 30):
        texts += [task.system("A"), task.system("B")]
        for turn in task.turns:
            texts += [turn.user, repr(turn.calls), turn.reply]
    return zlib.crc32("\n".join(texts).encode())


def publish(path, write):
    """write(tmp) fills a temporary folder; then MANIFEST.json (sizes, checksums), fsync, one atomic rename"""
    path = Path(path)
    tmp = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    write(tmp)
    manifest = {f.name: [f.stat().st_size, checksum(f)] for f in sorted(tmp.iterdir())}
    (tmp / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    for f in [*tmp.iterdir(), tmp]:
        fd = os.open(f, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(tmp, path)


def write_atomically(path, text):
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def lock(out):
    """From here on this process alone writes into the run folder. A POSIX lock: it dies with the process, and
    no child inherits it. (So the file is never closed.)"""
    file = os.open(out / "lock", os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"another process is writing the run in {out} ({error}); wait for it to end, or name "
                        "another --out.") from error
    except OSError as error:                     # some network file systems have no locks
        print(f"warning: {out} cannot be locked ({error}); see to it that no other process writes this run.")


def pretrained(name, dtype=torch.float32, template=None):
    """A Hugging Face name or folder -> model, Chat. What is loaded is what was named: all of its weights, no
    others, and none of its own code. template: a Jinja file, or one of TEMPLATES, instead of the model's"""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    except Exception as error:                   # every library below has its own exception types here
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load the model {name}: {reason}; check --model (a folder with config.json, "
                        "weights and tokenizer, or a Hugging Face name that can be downloaded).") from error
    for kind in ("missing", "unexpected"):       # missing ones would be random numbers
        if names := sorted(found[f"{kind}_keys"]):
            raise UserError(f"{name} has {kind} weights, so it is not the model that its config.json names: "
                            f"{', '.join(names[:3])} ({len(names)} in all).")
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(f"{name} has {', '.join(sorted(kinds))} layers; Layout and SlotCache of sft_step.py "
                        "are for full attention: name another --model.")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        hidden = model.get_decoder()(ids).last_hidden_state
        plain = hidden @ model.get_output_embeddings().weight.T      # what sft_step._logp_chunk computes
        if not torch.allclose(model(ids).logits, plain, rtol=0.01, atol=0.01):
            raise UserError(f"{name} scales, bounds or shifts its logits, which the losses here do not: they "
                            "would train other probabilities; name another --model.")
    try:
        if template:
            tokenizer.chat_template = TEMPLATES.get(template) or Path(template).read_text(encoding="utf-8")
        return model, Chat(tokenizer)
    except UserError:
        raise
    except Exception as error:                   # a template can raise anything
        which = f"--chat_template {template}" if template else f"the chat template of {name}"
        raise UserError(f"{which} cannot be used ({error!r}); pass a Jinja file with --chat_template, or "
                        f"{' or '.join(TEMPLATES)}.") from error


# ------------------------------------------------------------------------------------------------------------
# 8. The command line


def main(argv=None):
    p = argparse.ArgumentParser(description="What happened in these runs? Scores, states over time, verdict.")
    p.add_argument("runs", nargs="+", help="run folders, or their records (metrics.jsonl, .csv); of --probe "
                   "and --tokens also checkpoints and Hugging Face folders whose tokenizer has <tool_call>")
    views = {"transcripts": "conversations from the first step to the last, as Markdown",
             "probe": "control-token probabilities by slot, on ground truth",
             "spike": "control-token probabilities where messages begin, on the own rollouts of the starting "
             "model and of the newest checkpoint, and the KL between them",
             "kl": "KL to the starting model over training, from the recorded rollouts; writes RUN/kl.jsonl",
             "tokens": "one conversation, token by token, coloured by the probability of <tool_call> and of "
             "the end token there, before and after: ground truth, or --step's recorded one"}
    for view, help in views.items():
        p.add_argument(f"--{view}", action="store_const", const=view, dest="view", help=help)
    p.add_argument("--html", metavar="FILE", help="--tokens: as a self-contained page, not in the terminal")
    p.add_argument("--step", type=int, help="--tokens: a rollout that was recorded at this step")
    p.add_argument("--tasks", type=int, default=10, help="--probe, --spike: test tasks per category")
    p.add_argument("--world", choices=WORLDS, default="tiny", help="of a folder that belongs to no run")
    args, status = p.parse_args(argv), 0
    if args.html and len(args.runs) > 1:
        p.error("--html takes one run; each page is a file of its own")
    if args.view:                                # here, because that file stands above this one
        sys.path.append(str(Path(__file__).resolve().parent / "results"))
        from checkpoints import VIEWS
    for out in args.runs:
        try:
            if args.view:
                text = VIEWS[args.view](out, args)
            else:
                text = f"{timeline(read_records(out))}\n\n{summary(out)}"
            print(f"== {out}\n\n{text}\n")
        except (UserError, OSError, *DAMAGE) as error:               # say it, and go on with the other runs
            plain = isinstance(error, (UserError, OSError))
            reason = error if plain else f"{out} is not as a run leaves it: {error!r}"
            print(f"analyze_tokens.py: error: {reason}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
