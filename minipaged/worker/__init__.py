"""The device side of a step: the model and its cache, run from plain numbers."""
