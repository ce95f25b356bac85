"""Devices, files and the words for shapes: what every package uses."""
