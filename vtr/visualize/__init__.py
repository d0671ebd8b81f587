"""Pictures of policies: kept tokens on the image, on frames or per layer, rankings, animations, side by side, answers.

>>> shots = vtr.visualize.ask(model, processor, picture, "what color is the star", ["fastv:keep=0.1", "pool:grid=6"])
>>> vtr.visualize.kept(shots[0])                      # a matplotlib Figure; .savefig("kept.png")
>>> vtr.visualize.animate(shots[0]).save("kept.gif")

After a call of your own: ``shot = vtr.visualize.last(model, inputs, picture)``.
"""

from vtr.visualize.animation import Animation, animate
from vtr.visualize.figures import film, kept, side_by_side, staircase, words
from vtr.visualize.heatmap import ranking, rankings
from vtr.visualize.look import COLORS
from vtr.visualize.shots import Shot, ask, last

__all__ = [
    "COLORS", "Animation", "Shot", "animate", "ask", "film", "kept", "last", "ranking", "rankings", "side_by_side",
    "staircase", "words",
]  # fmt: skip
