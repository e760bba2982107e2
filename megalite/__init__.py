"""megalite: from raw text to a model that chats, trained with 3D parallelism.

Read next: README.md draws the floors; core/config.py says what a run is made of.
"""

__version__ = "0.1.0"
