"""The paper's figures, the simulator that they use, and the benchmarks of the documentation."""
