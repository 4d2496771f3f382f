"""Containers: how each kind of file is read, row by row, and which files of a folder are."""
