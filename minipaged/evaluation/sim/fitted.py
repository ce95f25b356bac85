"""All constants that were fitted to the paper's figures, with the figure used for each.

There are four for one GPU, two more for several workers, and two for beams.

Everything else in `minipaged.evaluation.sim` is arithmetic, a published number or a stated
assumption. A figure that was used for fitting proves nothing; the paper commands mark those.
"""

# Spread of output lengths: standard deviation over mean, before requests that are longer than the
# context are left out. The paper states only the means.
SHAREGPT_OUTPUT_CV = 1.05  # fitted to Figure 2: reserved and used slots of Orca (Max)
ALPACA_OUTPUT_CV = 1.02  # fitted to Figure 13b: batched requests of Orca (Pow2) and Orca (Oracle)

# Host time per step, in addition to the GPU: the first vLLM's scheduler and sampler in Python.
STEP_SECONDS = 2e-3  # fitted to Figure 13: batched requests of vLLM, both traces ...
SEQUENCE_SECONDS = 0.30e-3  # ... together with this, per decoding sequence

# Time per step that several workers add to their communication (`interconnect`): the control
# message, and waiting for the slowest. It raises the ratios between systems by 10 to 26 %.
SYNC_SECONDS = {"opt-66b": 17e-3, "opt-175b": 31e-3}  # fitted to the ends of Figure 12's axes

# Beams only: the synthetic model's certainty of its next token (the scale of its logits), which
# determines the ancestry of beams, and so how much they share.
PEAKEDNESS = {"alpaca": 3.0, "sharegpt": 25.0}  # fitted to Figure 15's beams
