"""Stands in for lmms-eval where it is not installed: found, and started as a module. Writes files as lmms-eval does."""
