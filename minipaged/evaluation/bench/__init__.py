"""The benchmarks: `minipaged bench ...` prints the measurements in the documentation."""
