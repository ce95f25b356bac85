"""Turns text or chat messages into token ids, and token ids back into text."""
