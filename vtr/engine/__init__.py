"""The engine: applies decisions to a running model. It knows no particular policy and no particular model family."""
