"""``vtr eval``: what policies keep of a model's answers."""
