"""One's own data, read in one way for ``vtr train``, ``vtr eval`` and ``vtr search``; pictures upright at every door.

``sources`` says what there is, ``files`` reads JSON, ``records`` makes samples of it, ``choices`` puts multiple-choice
questions, ``pictures`` opens pictures.
"""
