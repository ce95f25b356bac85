"""The tutorial's chapters: how they are read, run and shown."""
