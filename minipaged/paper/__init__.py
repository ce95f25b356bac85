"""The paper's evaluation again: a module a figure, published numbers beside ours.

Three kinds of figures: arithmetic that must come out exactly; simulations, in which the library's
real scheduler and memory serve a trace under a virtual clock (`minipaged.sim`); and measurements on
this machine's processor. Each prints the paper's number, ours, how far they may be apart, and
whether they are that near. Misses are printed like hits.
"""
