"""The pocket model that reads demonstrations: the shipped one with some decoder layers trained on.

``vtr.pocket.load("shots")`` loads it; recipe and figures are in ``weights/MODEL_CARD.md``. ``prompts`` draws prompts of
many pictures with remapped labels, ``python -m vtr.pocket.shots --out DIR`` trains it again.
"""
