#!/usr/bin/env bash
# A matplotlib figure in constrained layout, saved twice, is two pictures
#
# One would expect that saving only reads a figure: the same file each time, and a PNG that does not depend on whether a PDF was
# written first. Constrained layout is solved anew at every save, from where the one before it left the axes; with a legend
# that is anchored outside its axes (`bbox_to_anchor`) it has not settled after the first time, so that the second file
# differs, and so does a PNG after a PDF. Who holds pictures against each other by their bytes, or commits them, has to draw a
# figure anew for each file, or to write the files in one order always.
#
# Seen with matplotlib 3.11.2, numpy 2.4.6, pillow 13.0.0:
# fresh figures alike: True; saved again: 22203 of 1140750 pixels differ; after a PDF: 22191; legend inside, saved again: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check matplotlib==3.11.2 numpy==2.4.6 pillow==13.0.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def drawing(**legend):
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis in axes:
        axis.plot([0, 1, 2], [0, 1, 0], label="a")
        axis.set(title="Title", xlabel="step", ylabel="value (unit)")
    axes[3].legend(**legend)
    return figure


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


outside = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
once, first, later, inside = drawing(**outside), drawing(**outside), drawing(**outside), drawing()
alone = png(once)
again, fresh = png(once), png(first)
later.savefig(io.BytesIO(), format="pdf")
after = png(later)
plain = png(inside)
differ = [int((a != b).any(2).sum()) for a, b in ((alone, again), (fresh, after), (plain, png(inside)))]
print(f"fresh figures alike: {bool((alone == fresh).all())}; saved again: {differ[0]} of {alone[..., 0].size} pixels differ; "
      f"after a PDF: {differ[1]}; legend inside, saved again: {differ[2]}")
assert (alone == fresh).all() and differ[0] > 0 and differ[1] > 0 and differ[2] == 0
PYTHON
