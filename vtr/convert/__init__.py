"""Official checkpoints of trained methods → a transformers model and a vtr policy."""

from vtr.convert.llava import METHODS, Converted, convert_checkpoint

__all__ = ["METHODS", "Converted", "convert_checkpoint"]
