"""results/study_pictures.py -- the pictures of the first study, from its packed records.

    python results/study.py --pictures           draws results/study/*.png, all but first.png (see plot.py)
"""
import statistics

import numpy as np

from analyze_tokens import RIGHT, SLOTS, mean, smooth
from plot import pyplot
from rollout import CLOSE, OPEN
from study import DATA
from study_tables import OTHER, TRAINED, ends, fall, heard, runs, start, untreated


def pictures():
    aligned(DATA / "aligned.png")
    crossing(DATA / "crossing.png")
    alarm(DATA / "alarm.png")
    heat(runs("none")[0], "none-seed0", DATA / "heat.png")


def save(fig, png, tight=True):
    if tight:
        fig.tight_layout()
    fig.savefig(png, dpi=110)
    pyplot().close(fig)


def aligned(png):
    """Every run whose clean reward halved for good, on one axis: steps from that fall"""
    done = [records for records in runs("none") + runs("fast") if fall(records) is not None]
    panels = {"reward_clean": "clean reward", "state/polluted": "polluted messages",
              "p/open|text": "P(<tool_call> where text\nshould begin)",
              "p/calls_exact": "ground-truth calls that are\nthe model's first choice"}
    fig, axes = pyplot().subplots(1, len(panels), figsize=(11, 2.6), sharex=True)
    for ax, (column, title) in zip(axes, panels.items()):
        buckets = []                             # per run: {fifths of the steps from the fall: value}
        for records in done:
            steps, values = smooth(records, column, 1 if column.startswith("p/") else 5)
            since = [step - fall(records) for step in steps]
            ax.plot(since, values, color="#999999", lw=0.7)
            buckets.append({round(step / 5): value for step, value in zip(since, values)})
        shared = {}
        for t in range(-12, 9):
            values = [bucket[t] for bucket in buckets if t in bucket]
            if len(values) >= max(2, len(done) // 2):
                shared[5 * t] = mean(values)
        ax.plot(shared.keys(), shared.values(), "k-", lw=2)
        ax.axvline(0, color="black", ls=":")
        ax.set_xlim(-60, 40)
        ax.set_title(title)
        ax.set_xlabel("steps from the fall")
    axes[2].set_yscale("log")
    fig.suptitle(f"{len(done)} runs, aligned where the clean reward falls below half of its peak for good "
                 "(grey: runs, black: mean)", fontsize=8)
    save(fig, png)


def crossing(png):
    """Trained and unseen syntax at the end, one pair of bars per recipe; whiskers: lowest and highest seed"""
    names = [name for name in ("none", "strict", "sft", "sft_then_rl", "ops", "hbg", "ets", "prs", "slow",
                               "slow_ops", "slow_hbg", "slow_ets", "slow_prs") if runs(name)]
    fig, ax = pyplot().subplots(figsize=(10, 3))
    for score, label, side, colour, hatch, dashes in ((TRAINED, "trained syntax", -0.19, "#1b5e9b", "", "-"),
                                                      (OTHER, "other syntax", 0.19, "#e8c48a", "///", "--")):
        values = [100 * np.array(ends(name, score)) for name in names]
        middle = [mean(v) for v in values]
        down, up = [m - min(v) for m, v in zip(middle, values)], [max(v) - m for m, v in zip(middle, values)]
        ax.bar([i + side for i in range(len(names))], middle, 0.38, label=label, color=colour, hatch=hatch,
               edgecolor="black", lw=0.4, yerr=[down, up], capsize=2, error_kw={"lw": 0.8})
        before = 100 * start(score)
        ax.axhline(before, color="black", ls=dashes, lw=0.8, label=f"... before training: {before:.0f} %")
    ax.set_xticks(range(len(names)), [f"{name}\n{len(runs(name))} seeds" for name in names])
    ax.set_ylabel("test tasks solved with\nclean messages, %, greedy")
    ax.legend(ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    save(fig, png)


def alarm(png):
    """How many falls each metric announces (and how early), against how often it cries wolf, as its
    threshold moves"""
    done, factors = untreated(fast=False) + untreated(fast=True), (1.5, 2, 3, 5, 10, 20, 50)
    fell = sum(fall(records) is not None for records in done)
    quiet = len(done) - fell
    fig, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3))
    for column, style in (("p/open|text", "k-o"), ("p/open|off", "k--s"), ("p/json|in_text", "k:^"),
                          ("state/polluted", "-v"), ("entropy", "--D"), ("kl_sampler", ":x"),
                          ("grad_norm", "-.+")):
        announced, wolf, lead = [], [], []
        for factor in factors:
            leads, false = heard(done, column, factor)
            announced.append(len(leads) / max(fell, 1))
            wolf.append(false / max(quiet, 1))
            lead.append(statistics.median(leads) if leads else float("nan"))
        left.plot(wolf, announced, style, ms=3, lw=1, label=column)
        right.plot(factors, lead, style, ms=3, lw=1)
    left.set_xlabel(f"alarm without a fall (share of {quiet} runs)")
    left.set_ylabel(f"alarm before the fall (share of {fell})")
    left.legend()
    right.set_xscale("log")
    right.set_xlabel("threshold, times the value at the start")
    right.set_ylabel("median lead, steps")
    save(fig, png)


def heat(records, name, png):
    """A run's control tokens x slots over time, log10 of the mean probability: black = certain,
    white = 1e-5 or less"""
    probes = [r for r in records if "p/open|off" in r]
    every = max(1, len(probes) // 5)
    titles = {"open": OPEN, "close": CLOSE, "end": "<|im_end|>", "start": "<|im_start|>",
              "json": "JSON punctuation", "content": "content"}
    fig, axes = pyplot().subplots(2, 3, figsize=(10, 4.6), sharex=True, sharey=True)
    for ax, (c, title) in zip(axes.flat, titles.items()):
        lines = []
        for slot in SLOTS:                       # syntax B has no slots `open` and `close`
            lines.append([r.get(f"p/{c}|{slot}", 0.0) for r in probes])
        image = ax.imshow(np.log10(np.maximum(lines, 1e-5)), aspect="auto", cmap="Greys", vmin=-5, vmax=0,
                          interpolation="nearest")
        ax.set_title(title + (f"  (right only in: {RIGHT[c]})" if RIGHT.get(c) else ""), fontsize=8)
        ax.set_yticks(range(len(SLOTS)), SLOTS)
        ax.set_xticks(range(0, len(probes), every), [r["step"] for r in probes[::every]])
    for ax in axes[1]:
        ax.set_xlabel("step")
    fig.colorbar(image, ax=axes, label="log10 of the mean probability")
    fig.suptitle(f"{name}: what the model would say where, along the ground truth", fontsize=9)
    save(fig, png, tight=False)                  # the colour bar has made its own room
