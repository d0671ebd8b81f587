"""Other people's token and cache reduction, each in an environment of its own, measured beside vtr in the same run."""
