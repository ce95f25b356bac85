"""The paper's figures, the simulator behind them, and every benchmark of the documentation."""
