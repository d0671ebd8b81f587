"""Every image-text class of the installed transformers, built tiny: which of them vtr runs, and how."""
