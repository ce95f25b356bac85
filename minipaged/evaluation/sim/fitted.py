"""The constants that were fitted to the paper's figures: all of them, and to which.

Four for one GPU; two more for several workers, and two for beams.

Everything else in `minipaged.evaluation.sim` is arithmetic, a published number or a stated
assumption. A figure that was used for fitting proves nothing; the paper commands name those.
"""

# Spread of output lengths: standard deviation over mean, before requests that are longer than the
# context are left out. The paper gives the means only.
SHAREGPT_OUTPUT_CV = 1.05  # fitted to Figure 2: reserved and used slots of Orca (Max)
ALPACA_OUTPUT_CV = 1.02  # fitted to Figure 13b: batched requests of Orca (Pow2) and Orca (Oracle)

# The host's time per step besides the GPU's: the first vLLM's scheduler and sampler in Python.
STEP_SECONDS = 2e-3  # fitted to Figure 13: batched requests of vLLM, both traces ...
SEQUENCE_SECONDS = 0.30e-3  # ... together with this, for each sequence that decodes

# What several workers add to a step besides their communication, which `interconnect` computes: the
# control message, and waiting for the slowest. Ratios between systems rise by 10 to 26 % with it.
SYNC_SECONDS = {"opt-66b": 17e-3, "opt-175b": 31e-3}  # fitted to where Figure 12's axes end

# Beams only: how sure the synthetic model is of its next token, the scale of its logits. How beams
# descend from each other is the model's, and so is what they share.
PEAKEDNESS = {"alpaca": 3.0, "sharegpt": 25.0}  # fitted to Figure 15's beams
