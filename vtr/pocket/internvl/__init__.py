"""The pocket InternVL: the pocket tasks in transformers' InternVL classes, made out of the pocket LLaVA-NeXT.

``vtr.pocket.load("internvl")`` loads it; recipe and figures are in ``weights/MODEL_CARD.md``. ``model`` builds it and
has its training forwards, ``python -m vtr.pocket.internvl --out DIR`` trains it again.
"""
