"""Coverage-guided fuzzing of everything that reads what strangers write.

Each module named in ``TARGETS`` is a target: seeds, words to mutate with, and what must hold for every input.
``checking`` has what must hold for all of them, ``mutating`` changes documents so that they stay documents, ``worker``
is one process on one target, ``__main__`` runs workers and sums up. ``broken`` tests them: it claims what is not so.
"""

TARGETS = ("header", "index", "patterns", "spec", "manifest")
