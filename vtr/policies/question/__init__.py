"""Policies that look at the picture and the question, before the decoder."""
