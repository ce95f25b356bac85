"""The paper's figures, their simulator, and the benchmarks of the documentation."""
