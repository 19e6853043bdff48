"""What methods of reinforcement learning share: returns, losses, steppers, one definition each."""
