"""``vtr bench``: what policies cost, in time, memory and FLOPs."""
