"""Measuring policies: accuracy, tokens, FLOPs, latency. Uses only the public names of vtr."""
