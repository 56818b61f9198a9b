"""The colours of all figures. Those of Okabe and Ito can be distinguished by colour-blind readers."""

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"
PINK, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
INK, SOFT = "#1c2430", "#5b6675"  # a page may replace them in an SVG figure
RUN_COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, INK, GREY)
PHASE_COLOURS = {
    "data": PINK, "encode": ORANGE, "forward": SKY, "backward": BLUE, "optimizer": GREEN, "ema": YELLOW, "other": GREY,
}  # fmt: skip
