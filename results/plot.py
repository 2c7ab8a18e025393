"""results/plot.py -- runs side by side, drawn: reward, message states, the open tag, how far the model moved.

    python results/plot.py a.png runs/a runs/b           (run folders, their metrics.jsonl, or a study's CSV)
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analyze_tokens import DAMAGE, collapse, read_records, smooth  # noqa: E402
from rollout import STATES  # noqa: E402
from tools import UserError  # noqa: E402

# Readable in black and white: the states differ in hatching as well as in grey value.
FILLS = {"call": ("#1b5e9b", ""), "reply": ("#9ec9ea", ""), "polluted": ("#e08214", "///"),
         "collapsed": ("#7f3b08", "xx"), "empty": ("#cccccc", ".."), "cut": ("#666666", "--")}


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"font.size": 8, "legend.frameon": False, "legend.fontsize": 7, "hatch.linewidth": 0.4}
    return plt


def draw(paths, png):
    """One column per run, one time axis: reward; shares of the message states, stacked; the open tag where
    text should begin; how far the model has moved. Dotted line: collapse."""
    plt = pyplot()
    fig, axes = plt.subplots(4, len(paths), figsize=(1 + 3.2 * len(paths), 7.6), sharex="col", sharey="row",
                             squeeze=False, height_ratios=[1, 1.4, 1, 0.8])
    for column, path in zip(axes.T, paths):
        draw_run(column, read_records(path), Path(path).name.removesuffix(".csv").removesuffix(".jsonl"))
    labels = ("reward (mean of 5 steps)\n^ = an SFT phase", "share of messages",
              "P(<tool_call>)\nwhere text should begin", "how far the model moved,\nnats per token")
    for ax, label in zip(axes[:, 0], labels):
        ax.set_ylabel(label)
    axes[0, 0].set_ylim(0, 1.4 * axes[0, 0].get_ylim()[1])           # room for the legend
    axes[0, 0].legend(loc="upper left")
    axes[3, 0].legend(loc="upper left")
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="lower center", ncol=len(STATES))
    fig.tight_layout(rect=(0, 0.03, 1, 1))
    fig.savefig(png, dpi=110)
    plt.close("all")


def draw_run(column, records, name):
    reward, states, spike, moved = column
    reward.plot(*smooth(records, "reward"), "k-", label="task reward")
    reward.plot(*smooth(records, "reward_clean"), "k--", lw=1, label="... and every message clean")
    rolled = [r for r in records if "reward" in r]
    shares = [[r[f"state/{s}"] for r in rolled] for s in STATES]
    colours, hatches = zip(*(FILLS[s] for s in STATES))
    states.stackplot([r["step"] for r in rolled], shares, labels=STATES, colors=colours, hatch=hatches,
                     edgecolor="white", lw=0.2)
    spike.plot(*smooth(records, "p/open|text", 1), "k.-", lw=1)
    spike.set_yscale("log")
    moved.plot(*smooth(records, "p/moved", 1), "k.-", lw=1, label="mean |change of log p|, ground truth")
    for kl, line, label in (("kl_ref", "--", "KL to the reference, rollouts"),
                            ("kl_start", ":", "KL to the start, kept rollouts")):        # of --kl
        if any(r.get(kl) for r in records):
            moved.plot(*smooth(records, kl, 1), line, label=label)
    moved.set_xlabel("step")
    if phases := [r["step"] for r in records if "sft_updates" in r]:
        reward.plot(phases, [0] * len(phases), "k^", ms=4, clip_on=False)
    verdict = "no collapse"
    if found := collapse(records) or collapse(records, name="reward_clean"):
        verdict = f"collapse at step {found['step']}"
        for ax in column:
            ax.axvline(found["step"], color="black", ls=":", lw=1.2)
    reward.set_title(f"{name}\n{verdict}", fontsize=9)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("png")
    p.add_argument("runs", nargs="+", help="run folders, or their records (metrics.jsonl, .csv)")
    args, status, drawn = p.parse_args(argv), 0, []
    for out in args.runs:
        try:
            if not any("reward" in r for r in read_records(out)):
                raise UserError(f"{out} has no RL steps to draw.")
            _, trial = pyplot().subplots(4)      # a damaged run must not cost the others their picture
            draw_run(trial, read_records(out), out)
            drawn.append(out)
        except (UserError, *DAMAGE) as error:    # say it, and draw the other runs
            print(f"plot.py: error: {out}: {error}", file=sys.stderr)
            status = 2
    if drawn:
        draw(drawn, args.png)
    return status


if __name__ == "__main__":
    sys.exit(main())
