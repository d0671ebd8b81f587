"""Recipes for the methods that are trained: M3, p-MoD, Dynamic-LLaVA, and a loop that runs the latter two."""
