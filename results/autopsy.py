"""results/autopsy.py -- what exactly is broken in a collapsed checkpoint: an ability, or only its tokens?

    python results/autopsy.py --base results/base runs/a [runs/b ...] [--tasks 30] [--json FILE]

BASE is the model folder that the runs started from. Each line replaces one thing in a run's newest checkpoint
and plays test tasks of the run's world again: minutes per run of the embedded one on two cores. The score of
every line that names no other is the clean reward, greedy: solved, and every message a complete call or plain
text.

    == runs/a
       0.417   base: clean reward, greedy
       0.017   model: clean reward, greedy
       0.450   model, control tokens decided by base         little else is broken
       0.017   base, control tokens decided by model
       ...

--json writes the same numbers: {"runs/a": {"base: clean reward, greedy": 0.41666, ...}, "runs/b": ...}

    1. freely        the tasks, played: with constrained decoding, with two models that speak as one
    2. given truth   what is right behind a given beginning; which tokens rose where they do not belong
    3. repair        how many steps of SFT bring it back
    4. report        all of it
"""
import argparse
import copy
import json
import random
import sys
from collections import Counter
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from analyze_tokens import mean, places  # noqa: E402
from checkpoints import load, world_of  # noqa: E402
from rollout import OPEN, is_clean, parse  # noqa: E402
from sft_step import optimizer_step, sft_backward, trunk  # noqa: E402
from tools import UserError  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# 1. Played freely


def two_rules(chat):
    """No weights change: the end token is forbidden right after <tool_call>, and <tool_call> once a text has
    begun."""
    def rule(logits, said):                      # [n, V], the n messages so far
        for line, ids in enumerate(said):
            if ids and ids[-1] == chat.open_id:
                logits[line, list(chat.stop_ids)] = -torch.inf
            if ids and ids[0] != chat.open_id:
                logits[line, chat.open_id] = -torch.inf
        return logits
    return rule


class Swapped:
    """Two models that speak as one: the DONOR decides about the tokens `ids`, the HOST about everything else.

        p(k) = p_donor(k)                                              k in ids
        p(k) = p_host(k) (1 - p_donor(ids)) / (1 - p_host(ids))        all other k

    Both read the same conversation; their keys and values stand in one SlotCache, the donor's layers behind
    the host's. It has the five names that HFEngine asks a model for."""

    def __init__(self, host, donor, ids):
        self.host, self.donor, self.ids, self.device = host, donor, ids, host.device
        layers = host.config.num_hidden_layers + donor.config.num_hidden_layers
        # "layout": this model needs no switching; `trunk` switches each of the two when it is asked
        self.config = SimpleNamespace(num_hidden_layers=layers, _attn_implementation="layout")

    def eval(self):
        pass

    def get_decoder(self):
        return self._body

    def get_output_embeddings(self):
        return self._head

    def _body(self, layout, **kw):
        one = trunk(self.host, layout)                                                           # [1, T, D]
        two = trunk(self.donor, LayersBehind(layout, self.host.config.num_hidden_layers))        # [1, T, D]
        return SimpleNamespace(last_hidden_state=torch.cat([one, two], -1))                      # [1, T, 2 D]

    def _head(self, hidden):
        one, two = hidden.chunk(2, -1)
        p = torch.softmax(self.host.get_output_embeddings()(one).double(), -1)                   # [n, V]
        q = torch.softmax(self.donor.get_output_embeddings()(two).double(), -1)[:, self.ids]     # [n, K]
        p[:, self.ids] = 0
        p *= (1 - q.sum(-1, keepdim=True)) / p.sum(-1, keepdim=True).clamp(min=1e-30)
        p[:, self.ids] = q
        return p.log()


class LayersBehind:
    """A pass as the donor sees it: the same tokens, but its layer 0 is number `first` of the SlotCache"""

    def __init__(self, layout, first):
        self.ids, self.positions, self.layout, self.first = layout.ids, layout.positions, layout, first

    def attend(self, layer, q, k, v, scale):
        return self.layout.attend(self.first + layer, q, k, v, scale)


# ------------------------------------------------------------------------------------------------------------
# 2. Given the ground truth


@torch.no_grad()
def knows(model, chat, rows, syntax):
    """With the ground truth up to a point given, is every further token of the call (up to its last brace,
    without the closing tag) the model's first choice? -> the shares of calls, [0.56, 0.58, 0.60], for three
    points: <tool_call> (syntax B: the message's beginning), the name's start, the name's end"""
    hits = []
    for row in rows:
        logits = model(torch.tensor([row.ids], device=model.device)).logits[0]                   # [T, V]
        chosen = [None, *logits.argmax(-1).tolist()]             # chosen[t]: its choice in place of ids[t]
        for span in row.spans:
            if span.state == "call":
                hits.append(right_behind(chat, row, span, chosen, syntax))
    return [mean(of_point) for of_point in zip(*hits)]


def right_behind(chat, row, span, chosen, syntax):
    """One call -> [False, True, True]: for each point, are all choices behind it right?"""
    name = parse(span.text, syntax).calls[0][0]
    name_start = span.text.index(name)
    tag = len(OPEN) if span.text.startswith(OPEN) else 0
    points = (tag, name_start, name_start + len(name))
    stop = max(span.text.rfind("}"), span.text.rfind(")")) + 1
    right, before = [True] * len(points), 0      # before, said: characters of the message so far
    for t in range(span.start, span.end):
        said = len(chat.text(row.ids[span.start:t + 1]))
        if before < stop and chosen[t] != row.ids[t]:
            right = [ok and said <= point for ok, point in zip(right, points)]
        before = said
    return right


@dataclass
class Riser:
    token: str
    before: float                                # mean probability where it does not belong, of the base
    after: float                                 # ... and of the model


def risers(model, base, chat, rows, top=5):
    """Which tokens gained most probability where they do not belong, of ALL the vocabulary? -> [Riser]"""
    before, after = misplaced(base, chat, rows), misplaced(model, chat, rows)
    most = (after - before).topk(top).indices.tolist()
    return [Riser(chat.text([i]), before[i].item(), after[i].item()) for i in most]


@torch.no_grad()
def misplaced(model, chat, rows):
    """-> [V] mean probability; a place counts for every token but the right one"""
    total, n = 0, 0
    for row in rows:
        where = [place.position for place in places(chat, row)]
        logits = model(torch.tensor([row.ids], device=model.device)).logits[0]                   # [T, V]
        p = torch.softmax(logits[[t - 1 for t in where]].float(), -1)                            # [n, V]
        p[range(len(where)), [row.ids[t] for t in where]] = 0
        total, n = total + p.sum(0), n + len(where)
    return total / n


# ------------------------------------------------------------------------------------------------------------
# 3. Repair


def repaired(model, rows, steps, lr=5e-4, only=None):
    """-> a copy of the model after `steps` cross-entropy steps on 32 rows each. only: train only where these
    token ids stand."""
    model = copy.deepcopy(model).train()
    rows = [with_mask(row, only) for row in rows] if only else list(rows)
    random.Random("repair").shuffle(rows)        # tasks come sorted by category
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        some = [rows[(32 * step + i) % len(rows)] for i in range(32)]
        metrics = sft_backward(model, some)
        optimizer_step(model, optimizer, metrics["sft_loss"])
    return model.eval()


def with_mask(row, only):
    """-> a copy of the Episode that is trained at these token ids alone"""
    return replace(row, mask=[m * (i in only) for m, i in zip(row.mask, row.ids)])


def with_output_rows(model, donor, ids):
    """-> a copy of the model whose output layer has the donor's rows at these ids"""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[ids] = donor.get_output_embeddings().weight[ids]
    return model


# ------------------------------------------------------------------------------------------------------------
# 4. The report: {line: number}, printed as it grows


def autopsy(path, base, n_tasks=30):
    """A run folder, and the model that it started from -> the report"""
    found = load(path)
    model, chat, world, report = found.model, found.chat, world_of(found, n_tasks), {}
    examine(report, "base", base, world)
    examine(report, "model", model, world)
    swaps(report, model, base, world)
    repairs(report, model, base, world)
    drift(report, model, base, chat)
    found = risers(model, base, chat, world.truths(world.test))
    for riser in found:
        print(f"{riser.after:8.3f}   mean probability of {riser.token!r} where it does not belong; "
              f"base {riser.before:.4f}")
    return report | {"risers": [astuple(riser) for riser in found]}


def note(report, name, value):
    report[name] = value
    print(f"{value:8.3f}   {name}", flush=True)


def examine(report, who, model, world):
    """What a model can do, as it is"""
    note(report, f"{who}: task reward, greedy", mean(e.reward for e in world.play(model)))
    note(report, f"{who}: clean reward, greedy", world.score(model))
    note(report, f"{who}: clean reward, sampled", world.score(model, temperature=1.0))
    crossed = world.score(model, syntax=world.other)
    note(report, f"{who}: clean reward in syntax {world.other}, greedy", crossed)
    failed = [e for e in world.play(model, temperature=1.0) if not (e.reward and is_clean(e.states))]
    note(report, f"{who}: of the failures, sampled: those with a malformed message",
         mean(not is_clean(e.states) for e in failed))
    for syntax in (world.syntax, world.other):
        shares = knows(model, world.chat, world.truths(world.test, syntax), syntax)
        for point, share in zip(("the open tag", "the name's start", "the name's end"), shares):
            note(report, f"{who}: teacher-forced, syntax {syntax}, calls right from {point} on", share)


def punctuation_ids(chat):
    """-> the ids of all tokens that are spelled with JSON's punctuation alone"""
    texts = chat.tokenizer.batch_decode([[i] for i in range(len(chat.tokenizer))])
    return [i for i, text in enumerate(texts) if text.strip() and set(text) <= set(' \n{}[]()":,=\'')]


def control_ids(chat):
    """-> sorted ids"""
    return sorted({*chat.control_ids().values(), chat.end_id})


def swaps(report, model, base, world):
    """No weights are trained: who decides about which tokens?"""
    chat, control = world.chat, control_ids(world.chat)
    note(report, "model, two rules (no end after <tool_call>, no <tool_call> inside text)",
         world.score(model, rule=two_rules(chat)))
    said = Counter()
    for row in world.truths(world.train):
        said.update(i for i, trained in zip(row.ids, row.mask) if trained and i not in control)
    others = [i for i, _ in said.most_common(len(control))]      # the hardest comparison: said more often
    for name, ids in (("control tokens", control), ("JSON punctuation", punctuation_ids(chat)),
                      ("the most frequent other tokens", others)):
        note(report, f"model, {name} decided by base", world.score(Swapped(model, base, ids)))
        note(report, f"base, {name} decided by model", world.score(Swapped(base, model, ids)))
    note(report, "model, output rows of the control tokens from base",
         world.score(with_output_rows(model, base, control)))


def repairs(report, model, base, world):
    """How much training brings it back, and is that more than what training teaches anyhow?"""
    rows, control = world.truths(world.train), set(control_ids(world.chat))
    for steps in (1, 2, 4, 8, 16):
        note(report, f"model: after {steps} SFT steps", world.score(repaired(model, rows, steps)))
    note(report, "base: after 16 SFT steps", world.score(repaired(base, rows, 16)))
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(base.config).to(base.device)
    note(report, "a model without any training, after 16 SFT steps",
         world.score(repaired(untrained, rows, 16)))
    for steps in (4, 16):
        note(report, f"model: after {steps} SFT steps on control tokens only",
             world.score(repaired(model, rows, steps, only=control)))


def drift(report, model, base, chat):
    """How far have the control tokens' output rows moved, compared with all rows?"""
    now, then = model.get_output_embeddings().weight, base.get_output_embeddings().weight         # [V, D]
    moved = (now - then).detach().norm(dim=-1)                                                    # [V]
    for i in (chat.open_id, chat.close_id, chat.end_id):
        note(report, f"drift of the output row of {chat.text([i])}, in medians of all rows",
             (moved[i] / moved.median()).item())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders: their newest checkpoints; or Hugging Face folders")
    p.add_argument("--base", required=True, help="the model folder that they started from")
    p.add_argument("--tasks", type=int, default=30, help="test tasks per category")
    p.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args, status, reports = p.parse_args(argv), 0, {}
    for path in args.runs:
        try:
            print(f"== {path}")
            reports[path] = autopsy(path, load(args.base).model, args.tasks)
        except UserError as error:               # say it, and go on with the other runs
            print(f"autopsy.py: error: {error}", file=sys.stderr)
            status = 2
    if reports and args.json:
        Path(args.json).write_text(json.dumps(reports, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
