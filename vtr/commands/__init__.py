"""Commands of ``vtr``, one file each; vtr/cli.py registers them."""
