"""The benchmarks: `minipaged bench ...` prints the measurements that the documentation quotes."""
