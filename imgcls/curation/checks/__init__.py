"""Checks of a data set: bad images, duplicates, leaks, suspicious labels."""
