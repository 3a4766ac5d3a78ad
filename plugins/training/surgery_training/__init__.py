"""Training of what recipes add to models: the commands `surgery train`, `generate` and `eval`.

What is here is light to import. `surgery_training.run` trains, `surgery_training.inference` tries and
measures; both need transformers.
"""

from surgery_training.curves import draw_curves
from surgery_training.history import History
from surgery_training.settings import DataSettings, TrainingSettings, load_training_settings

__version__ = "0.1.0"

__all__ = [
    "DataSettings",
    "History",
    "TrainingSettings",
    "draw_curves",
    "load_training_settings",
]
