"""Policies that look at nothing: the same tokens whatever the picture shows and the question asks."""
