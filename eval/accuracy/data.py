"""Questions about pictures to evaluate on: the reader that ``vtr train`` and ``vtr search`` have too (``vtr.data``)."""

from vtr.data.pictures import BadPictureError
from vtr.data.records import COLUMNS, Bad, Sample, samples_of
from vtr.data.sources import POCKET, POCKET_QUESTIONS, TASKS, Source, open_data, pocket_questions, settings_of
from vtr.data.videos import Video

__all__ = [
    "COLUMNS",
    "POCKET",
    "POCKET_QUESTIONS",
    "TASKS",
    "Bad",
    "BadPictureError",
    "Sample",
    "Source",
    "Video",
    "open_data",
    "pocket_questions",
    "samples_of",
    "settings_of",
]
