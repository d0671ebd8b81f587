"""The commands of ``vtr`` that are more than a few lines, one file each; what they need is imported when they run."""
