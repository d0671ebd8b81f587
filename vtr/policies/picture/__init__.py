"""Policies that look at the picture, through the vision tower."""
