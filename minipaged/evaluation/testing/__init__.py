"""Helpers that the tests of the library and of the labs share."""
