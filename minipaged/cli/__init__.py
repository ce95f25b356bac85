"""The command line: `main` declares the commands, and a module per command does the work."""
