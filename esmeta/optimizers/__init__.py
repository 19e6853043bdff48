"""Optimizers: one module per value of ``--optimizer``, each with a class ``Optimizer``."""
