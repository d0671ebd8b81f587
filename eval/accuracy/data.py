"""Questions about pictures to evaluate on: the reader that ``vtr train`` and ``vtr search`` have too (``vtr.data``)."""

from vtr.data.pictures import BadPictureError
from vtr.data.records import COLUMNS, Bad, Sample, samples_of
from vtr.data.sources import POCKET, POCKET_QUESTIONS, Source, open_data, settings_of

__all__ = [
    "COLUMNS",
    "POCKET",
    "POCKET_QUESTIONS",
    "Bad",
    "BadPictureError",
    "Sample",
    "Source",
    "open_data",
    "samples_of",
    "settings_of",
]
