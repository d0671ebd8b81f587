"""transformers' own tests of the supported families, run on patched models (`.ci/upstream` says how)."""
