"""The paper's figures, the simulator behind them, and the benchmarks of the documentation."""
