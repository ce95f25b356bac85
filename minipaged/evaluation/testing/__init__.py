"""What the tests of the library and those of the labs share."""
