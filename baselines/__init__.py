"""Baseline token mixers, one file each; the file name is the registry key."""
