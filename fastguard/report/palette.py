"""The colours of everything that is drawn, of the Okabe-Ito palette: they differ for the colour-blind as well."""

from __future__ import annotations

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
CURVES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
"""For several curves, in this order."""
GREY = "#999999"
"""For a curve that another is compared with."""
EARLY_TO_LATE = ("#9ecae1", "#4292c6", "#08306b")
"""Blues for the first, a middle and the last of some epochs."""
REFERENCE = "#777777"
"""For thin lines at a value that curves are read against."""
