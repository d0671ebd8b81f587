"""Committed studies, each one command."""
