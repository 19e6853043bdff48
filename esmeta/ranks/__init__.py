"""The ranks of a job: who they are, and how they tell one another what they know."""
