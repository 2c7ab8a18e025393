"""results/measure_base.py -- what an embedded base can do: a row of the table in results/base/README.md.
make_base.py calls it.

    python results/measure_base.py runs/base-seed1 "main, seed 1"
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analyze_tokens import probe, rollout_metrics  # noqa: E402
from rollout import demonstrate  # noqa: E402
from supervision import Signal, sample_groups  # noqa: E402
from tools import World  # noqa: E402
from train import (BASE, evaluate, evaluation_sets, limits_of, load_model, make_engine,  # noqa: E402
                   parse_args, sampling)

PAGE = BASE / "README.md"
COLUMNS = ("test tasks", "new tools", "sampled", "mixed groups", "malformed", "P(open)")


def measure(folder, syntax, n):
    """-> {"parameters": 760288, "test tasks": 37.5, ...}; greedy on n tasks of every category, 8 samples of n
    training tasks. All but the first are percent."""
    args = parse_args(["--model", str(folder), "--syntax", syntax, "--eval_tasks", str(n), "--threads", "1"])
    world, limits, (model, chat) = World(args), limits_of(args), load_model(str(folder), args, "cpu")
    signal, prompts = Signal(args, chat, [], limits), world.mixed("train", n)
    with sampling(engine := make_engine(args, model, chat), model):
        greedy = evaluate(engine, chat, evaluation_sets(world, args, "validation"), world, args)
        sampled = sample_groups(signal, engine, prompts, range(n), seed=(args.seed, 0))
    metrics = rollout_metrics(sampled, [e.reward for e in sampled])
    truth = [demonstrate(chat, task, syntax, limits) for task in world.mixed("validation", 30)]
    return {"parameters": sum(p.numel() for p in model.parameters()),
            "test tasks": greedy["average_clean"],
            "new tools": greedy["content_ood_clean"],
            "sampled": metrics["reward"],
            "mixed groups": metrics["mixed_groups"],
            "malformed": 1 - metrics["state/call"] - metrics["state/reply"],
            "P(open)": probe(model, chat, truth)["p/open|text"]}


def write_row(folder, name, n=50):
    """| main, seed 0 | 0.76 M | 37.5 / 37.5 | ... |   in syntax A / B; a row of the same name is replaced"""
    a, b = measure(folder, "A", n), measure(folder, "B", n)
    row = f"| {name} | {a['parameters'] / 1e6:.2f} M |"
    for column in COLUMNS:
        row += f" {100 * a[column]:.1f} / {100 * b[column]:.1f} |"
    others = [line for line in PAGE.read_text().splitlines() if not line.startswith(f"| {name} |")]
    PAGE.write_text("\n".join([*others, row, ""]))
    print(row)


if __name__ == "__main__":
    write_row(*sys.argv[1:])
