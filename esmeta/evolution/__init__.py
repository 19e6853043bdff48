"""Evolution: one search, of which each file in ``esmeta/optimizers`` is a rule.

Theta through a generation: the ``Rule`` of a search (``optimizers/openes.py``), ``search.py`` (the
step), ``population.py`` (members around theta, their scores, sums over all ranks), and back to the
update of that rule, which follows ``ascent.py``. ``noise.py``, ``scores.py`` and ``shaping.py``
hold what is drawn, what becomes of members that fail, and what fitness is worth; ``windows.py``
wraps a rule. ``replicated.py`` is the step of EvoTorch's searches, ``evotorch.py`` a problem for
EvoTorch itself.
"""
