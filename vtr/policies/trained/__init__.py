"""Policies with weights or thresholds fitted to a model."""
