"""Policies that act in the decoder, where the question's attention ranks the tokens."""
