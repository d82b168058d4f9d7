"""Draws docs/domains_seesaw.svg from benchmarks/results/domains_kuairand.json.

For each split, label and tab it shows how far each model's AUC lies from that of one model for each
tab, with two standard errors to both sides.

    python benchmarks/draw_domains.py
"""

from __future__ import annotations

import json

from matplotlib import pyplot as plt
from tables import RESULTS, ROOT

SPLITS = {
    "k5": "later days",
    "kf": "new users",
    "rolling": "a new model each day",
}
MODELS = {
    "one model, tab as a feature": "tab as a feature",
    "the same, wider (capacity control)": "the same, wider",
    "MMoE": "MMoE",
    "PLE": "PLE",
    "STAR": "STAR",
    "shared + own experts, gate, star tower": "cross-domain assembly",
}
TABS = ("tab 1", "tab 0", "tab 4", "tab 6", "tab 2")


def main() -> None:
    """Draws it."""
    rows = json.loads((RESULTS / "domains_kuairand.json").read_text(encoding="utf-8"))["rows"]
    plt.rcParams |= {"svg.hashsalt": "qianmo", "svg.fonttype": "none", "font.size": 9}
    figure, axes = plt.subplots(2, 3, figsize=(11, 7), sharex=True, sharey=True, layout="tight")
    for (split, title), column in zip(SPLITS.items(), axes.T, strict=True):
        for label, axis in zip(("is_click", "long_view"), column, strict=True):
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_title(f"{label}, {title}")
            for i, (model, name) in enumerate(MODELS.items()):
                where = (split, label, model)
                found = [r for r in rows if (r["split"], r["label"], r["model"]) == where]
                if not found:  # most designs are on one split alone
                    continue
                row = found[0]
                cells = [row[tab].rstrip(")").split(" (") for tab in TABS]
                axis.errorbar(
                    [float(value) for value, _ in cells],
                    [y + 0.13 * (i - 2.5) for y in range(len(TABS))],
                    xerr=[2 * float(error) for _, error in cells],
                    fmt="o",
                    color=f"C{i}",
                    markersize=3,
                    linewidth=1,
                    label=name,
                )
    axes[0, 0].set_yticks(range(len(TABS)), TABS)
    axes[0, 0].invert_yaxis()
    for axis in axes[1]:
        axis.set_xlabel("AUC - that of one model per tab, in thousandths")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(ROOT / "docs" / "domains_seesaw.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
