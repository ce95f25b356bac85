"""What only a GPU can show, in one run of at most eight minutes (`minipaged bench gpu`)."""
