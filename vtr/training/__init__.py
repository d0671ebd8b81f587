"""Recipes for the methods that are trained: M3."""
