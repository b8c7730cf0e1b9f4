"""Draws step.svg: one penalised step.   python docs/figures/step.py"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch


CLEAN, MOVED, PLAIN = "#cfe3f7", "#fbd9c2", "#e6e6e6"
BOXES = (  # x, width, row, colour, text
    *((x, 1.3, 1, CLEAN, f"micro-batch {n}\nforward, backward") for x, n in ((0.0, "1"), (1.4, "2"), (2.8, "M"))),
    (4.4, 1.5, 1, PLAIN, "‖g₁‖\none all-reduce"),
    (6.2, 1.8, 1, PLAIN, "θ → θ + r g₁/‖g₁‖\neach rank, its shard"),
    *((x, 1.3, 0, MOVED, f"micro-batch {n}\nforward, backward") for x, n in ((0.0, "1"), (1.4, "2"), (2.8, "M"))),
    (4.4, 1.5, 0, PLAIN, "back to θ\nbit for bit"),
    (6.2, 1.8, 0, PLAIN, "(1-α) g₁ + α g₂\nclip, step, log"),
)


def main() -> None:
    figure, axes = plt.subplots(figsize=(9.6, 3.0))
    for x, width, row, colour, text in BOXES:
        box = FancyBboxPatch((x, row * 1.6), width, 0.9, boxstyle="round,pad=0.02,rounding_size=0.08")
        box.set(facecolor=colour, edgecolor="#555555", linewidth=0.8)
        axes.add_patch(box)
        axes.text(x + width / 2, row * 1.6 + 0.45, text, ha="center", va="center", fontsize=8)
    for row in (0, 1):
        for x, to in ((4.1, 4.4), (5.9, 6.2)):
            axes.annotate("", (to, row * 1.6 + 0.45), (x, row * 1.6 + 0.45), arrowprops={"arrowstyle": "->"})
    bent = {"arrowstyle": "->", "connectionstyle": "angle,angleA=-90,angleB=180,rad=6"}
    axes.annotate("", (7.1, 1.25), (7.1, 1.6), arrowprops={"arrowstyle": "-"})
    axes.annotate("", (-0.25, 1.25), (7.1, 1.25), arrowprops={"arrowstyle": "-"})
    axes.annotate("", (0.0, 0.45), (-0.25, 1.25), arrowprops=bent)
    axes.text(0.0, 2.65, "first pass, at θ: as in Trainer; inputs and states are remembered", fontsize=9)
    axes.text(0.0, 1.0, "second pass, at the moved weights: same inputs, same states, no trace", fontsize=9)
    axes.set(xlim=(-0.4, 8.2), ylim=(-0.15, 3.0))
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
