"""The tiny models that ship in ``vtr.testing``, under the name tests know them by."""

from vtr.testing.tiny import *  # noqa: F403
