"""The paper's evaluation, reproduced: one module per figure, published numbers next to ours.

There are three kinds of figures: arithmetic, which must agree exactly; simulations, in which the
library's real scheduler and memory serve a trace with a virtual clock (`minipaged.evaluation.sim`);
and measurements on this machine's processor. Each prints the paper's number, ours, the tolerance,
and whether the two agree within it. Misses are printed as well.
"""
