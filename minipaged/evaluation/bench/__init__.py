"""What the numbers in the documentation come from: `minipaged bench ...` prints each of them."""
