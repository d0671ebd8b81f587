"""Many shots: demonstrations whose labels have to be read, and what their pictures may cost (``vtr eval --shots``)."""
