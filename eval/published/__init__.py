"""``vtr eval published``: tables of papers, run again by lmms-eval with vtr, ours beside theirs."""
