"""The command line; `main` has the commands, a module per command does the work."""
