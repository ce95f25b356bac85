"""`python -m minipaged` is the same as `minipaged`."""

from minipaged.cli.main import main

main()
