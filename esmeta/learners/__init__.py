"""Learners: inner-loop training of P agents as one batch. One module per hand-written learner."""
