"""``python -m vtr.eval.gpu``: is the engine right on a GPU, and what does it cost there, within minutes.

It runs from a checkout that is not installed, with torch, transformers and numpy alone: nothing here imports more.
"""
