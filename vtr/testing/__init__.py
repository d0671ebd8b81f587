"""For those who write policies: :func:`check_policy` runs on yours what the shipped ones pass."""

from vtr.testing.check import Checked, PolicyError, check_policy

__all__ = ["Checked", "PolicyError", "check_policy"]
