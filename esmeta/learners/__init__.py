"""Hand-written learners, which train agents inside their lives. One module per learner."""
