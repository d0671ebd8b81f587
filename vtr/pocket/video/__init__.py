"""The pocket video model: the pocket InternVL, trained on to answer questions about films whose answers need time.

``vtr.pocket.load("video")`` loads it; recipe and figures are in ``weights/MODEL_CARD.md``. ``films`` draws films and
questions, ``model`` builds it, ``watch`` is its training stage, ``python -m vtr.pocket.video --out DIR`` trains it.
"""
